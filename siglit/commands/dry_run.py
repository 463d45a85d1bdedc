"""`siglit train --dry-run`: which parameters would be trained, with which learning rates and decay; writes nothing.

Builds the towers as training does, so missing files are reported here too.
"""

from dataclasses import dataclass

from siglit.config import Experiment
from siglit.models.tokenizer import load_tokenizer
from siglit.planning.memory import tokenizer_or_placeholder
from siglit.runs.launch import check_batch_fits, check_batch_size, quiet_lightning
from siglit.runtime.text import plural
from siglit.training.data import open_data
from siglit.training.module import SigLiT
from siglit.training.optim import group_table, lr_multiplier, parameter_groups, total_steps


@dataclass(frozen=True)
class DryRun:
    """The parameters, their groups and the schedule of a training, as text."""

    table: str
    """All tensors, and the optimizer's groups."""
    unused: str
    """The tensors that the towers never read; empty where they read all."""
    schedule: str
    """Steps, epochs, and the learning rate at a few of the steps."""

    def __str__(self) -> str:
        """All parts, with an empty line between them."""
        return "\n\n".join(part for part in (self.table, self.unused, self.schedule) if part)


def dry_run(experiment: Experiment) -> DryRun:
    """Build what `siglit train` would build and describe its optimizer and schedule.

    Raises:
        UserError: the experiment cannot be trained, for the reasons that `siglit train` finds before its first step.
    """
    quiet_lightning()
    optim, train = experiment.optim, experiment.train
    check_batch_size(train)
    data = open_data(experiment)
    check_batch_fits(train, data.count)
    steps = total_steps(train, data.count)
    name = experiment.tokenizer.path or experiment.text_tower.pretrained
    tokenizer = load_tokenizer(name, experiment.tokenizer) if name else tokenizer_or_placeholder(experiment)
    data.tokenizer = tokenizer  # type: ignore[assignment]
    module = SigLiT(experiment, steps)
    module.build(data)
    groups = parameter_groups(module, optim, module.multipliers())
    table = group_table(groups, module.named_parameters(), optim)
    shown = {min(round(steps * share), steps - 1) for share in (0, 0.01, 0.1, 0.5, 0.9, 1)}
    learning_rates = ", ".join(
        f"{step:,}: {optim.lr * lr_multiplier(step, optim, steps, train.batch_size):.3g}" for step in sorted(shown)
    )
    examples = steps * train.batch_size
    return DryRun(
        table,
        _unused(module),
        f"{plural(steps, 'step')} of {plural(train.batch_size, 'pair')} = {plural(examples, 'example')}, "
        f"{examples / data.count:,.2f} epochs of {plural(data.count, 'image')}; mode {experiment.mode}\n"
        f"learning rate at step {learning_rates}",
    )


def _unused(module: SigLiT) -> str:
    """The tensors that the towers never read, one per line."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = module.unused()
    if len(names) == 0:
        return ""
    count = sum(parameters[name].numel() for name in names)
    size = f"{plural(len(names), 'tensor')} of {plural(count, 'parameter')}"
    return "\n".join([f"never read, so left unchanged: {size} (locked above)", *names])
