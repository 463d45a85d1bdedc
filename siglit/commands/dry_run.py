"""`siglit train --dry-run`: what would be trained, how fast and with which decay, without training or writing anything.

Builds the towers as training does, so what is missing is found here too.
"""

from dataclasses import dataclass

from siglit.config import Experiment
from siglit.models.tokenizer import load_tokenizer
from siglit.planning.memory import tokenizer_or_placeholder
from siglit.runs.launch import check_batch_fits, check_batch_size, quiet_lightning
from siglit.training.data import open_data
from siglit.training.module import SigLiT
from siglit.training.optim import group_table, lr_multiplier, parameter_groups, total_steps


@dataclass(frozen=True)
class DryRun:
    """The table of parameters, those that are never read, and the schedule in words."""

    table: str
    unused: str
    """Empty where every parameter is read."""
    schedule: str

    def __str__(self) -> str:
        """All of it."""
        return "\n\n".join(part for part in (self.table, self.unused, self.schedule) if part)


def dry_run(experiment: Experiment) -> DryRun:
    """Build what `siglit train` would build and say what its optimiser would do.

    Raises:
        UserError: what `siglit train` would raise before its first step.
    """
    quiet_lightning()
    optim, train = experiment.optim, experiment.train
    check_batch_size(train)
    data = open_data(experiment)
    check_batch_fits(train, data.count)
    steps = total_steps(train, data.count)
    named = experiment.tokenizer.path or experiment.text_tower.pretrained
    found = load_tokenizer(named, experiment.tokenizer) if named else tokenizer_or_placeholder(experiment)
    data.tokenizer = found  # type: ignore[assignment]
    module = SigLiT(experiment, steps)
    module.build(data)
    groups = parameter_groups(module, optim, module.multipliers())
    table = group_table(groups, module.named_parameters(), optim)
    told = [0, *(round(steps * share) for share in (0.01, 0.1, 0.5, 0.9)), steps - 1]
    rates = ", ".join(
        f"{step:,}: {optim.lr * lr_multiplier(step, optim, steps, train.batch_size):.3g}" for step in sorted({*told})
    )
    passes = steps * train.batch_size / data.count
    return DryRun(
        table,
        _unused(module),
        f"{steps:,} steps of {train.batch_size:,} pairs = {steps * train.batch_size:,} examples, {passes:,.2f} passes "
        f"over {data.count:,} images; mode {experiment.mode}\nlearning rate at step {rates}",
    )


def _unused(module: SigLiT) -> str:
    """List what the towers never read, a line for each of them."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = module.unused()
    if not names:
        return ""
    count = sum(parameters[name].numel() for name in names)
    return "\n".join(
        [f"never read, so left as they are: {len(names)} parameters of {count:,} numbers (locked above)", *names]
    )
