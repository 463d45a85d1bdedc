"""The loss is the paper's formula, and any number of ranks trains like one process on the global batch."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from siglit.loss import sigmoid_loss

PAIRS, LENGTH, WORDS, DIM = 12, 5, 23, 8
RANKS = (1, 2, 3)


class Model(nn.Module):
    """A small text tower with t' and b, returning the loss, as DDP wants the whole of it in one forward."""

    def __init__(self, loss=sigmoid_loss):
        super().__init__()
        self.tower = nn.Sequential(
            nn.Embedding(WORDS, 16), nn.Flatten(), nn.LayerNorm(16 * LENGTH), nn.Linear(16 * LENGTH, 24), nn.GELU()
        )
        self.head = nn.Linear(24, DIM)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-4.0))
        self.loss = loss

    def forward(self, zimg, ids, group=None):
        ztxt = F.normalize(self.head(self.tower(ids)), dim=1)
        return self.loss(zimg, ztxt, self.log_scale.exp(), self.logit_bias, group)


def forgets_the_offset(zimg, ztxt, logit_scale, logit_bias, group=None):
    """A wrong loss: rank r's texts are paired with the first rank's images."""
    blocks = [torch.empty_like(zimg) for _ in range(dist.get_world_size(group))]
    dist.all_gather(blocks, zimg, group=group)
    logits = ztxt @ torch.cat(blocks).T * logit_scale + logit_bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(ztxt)


def model_and_batch(loss=sigmoid_loss):
    generator = torch.Generator().manual_seed(0)
    zimg = F.normalize(torch.randn(PAIRS, DIM, dtype=torch.float64, generator=generator), dim=1)
    ids = torch.randint(0, WORDS, (PAIRS, LENGTH), generator=generator)
    torch.manual_seed(1)
    return Model(loss).double(), zimg, ids


def mean_gradients(loss, group, through_ddp):
    """The mean over the ranks of a group of every parameter's gradient, and of the loss under the name "loss"."""
    model, zimg, ids = model_and_batch(loss)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = slice(rank * PAIRS // size, (rank + 1) * PAIRS // size)
    # A small bucket makes DDP reduce in several pieces.
    wrapped = DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.001) if through_ddp else model
    value = wrapped(zimg[mine], ids[mine], group)
    value.backward()
    result = {name: p.grad for name, p in model.named_parameters()} | {"loss": value.detach()}
    for name, tensor in result.items():
        if not through_ddp or name == "loss":
            dist.all_reduce(tensor, group=group)
            tensor.div_(size)
    return result


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(RANKS))
    results = {}
    for size in RANKS:
        # All processes take part in making a group; None stands for the group of all.
        group = dist.new_group(list(range(size))) if size < max(RANKS) else None
        if rank < size:
            for through_ddp in (False, True):
                results[size, through_ddp] = mean_gradients(sigmoid_loss, group, through_ddp)
    results["wrong"] = mean_gradients(forgets_the_offset, None, False)
    if rank == max(RANKS) - 1:
        torch.save(results[max(RANKS), True], f"{folder}/last.pt")
    if rank == 0:
        torch.save(results, f"{folder}/first.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=max(RANKS))
    return {
        **torch.load(folder / "first.pt", weights_only=True),
        "last": torch.load(folder / "last.pt", weights_only=True),
    }


def one_process():
    model, zimg, ids = model_and_batch()
    value = model(zimg, ids)
    value.backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": value.detach()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def pairs(batch, dim, seed=0, scale=10.0, bias=-10.0):
    generator = torch.Generator().manual_seed(seed)
    zimg, ztxt = (F.normalize(torch.randn(batch, dim, dtype=torch.float64, generator=generator)) for _ in range(2))
    return zimg, ztxt.requires_grad_(), *(torch.tensor(v, dtype=torch.float64).requires_grad_() for v in (scale, bias))


def formula(zimg, ztxt, scale, bias):
    """Equation 1, pair by pair."""
    total = 0
    for i in range(len(zimg)):
        for j in range(len(ztxt)):
            z = 1 if i == j else -1
            total = total + torch.log(1 / (1 + torch.exp(-z * (scale * torch.dot(zimg[i], ztxt[j]) + bias))))
    return -total / len(zimg)


@pytest.mark.parametrize(("batch", "dim"), [(1, 3), (2, 1), (7, 5), (16, 32)])
def test_value_and_gradients_are_those_of_equation_1(batch, dim):
    arguments = pairs(batch, dim)
    value, wanted = sigmoid_loss(*arguments), formula(*arguments)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(value, arguments[1:]), torch.autograd.grad(wanted, arguments[1:]), rtol=1e-11, atol=1e-12
    )


def test_extreme_logits_stay_finite():
    """At scale 1000 the naive logarithm overflows; the loss and its gradients do not."""
    arguments = [a.detach().float().requires_grad_() for a in pairs(6, 4, scale=1000.0, bias=500.0)]
    value = sigmoid_loss(*arguments)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, arguments[1:]))


def test_the_locked_side_gets_no_gradient():
    zimg, ztxt, scale, bias = pairs(4, 3)
    zimg.requires_grad_()
    sigmoid_loss(zimg, ztxt, scale, bias).backward()
    assert zimg.grad is None
    assert ztxt.grad is not None


def test_logits_are_float32_under_bf16_autocast():
    """Value and gradients under autocast are those without it, bit for bit; bfloat16 logits would be far off."""
    arguments = [a.detach().float().requires_grad_() for a in pairs(64, 48, scale=100.0)]
    wanted = sigmoid_loss(*arguments)
    gradients = torch.autograd.grad(wanted, arguments[1:])
    with torch.autocast("cpu", torch.bfloat16):
        value = sigmoid_loss(*arguments)
        rough = (arguments[1] @ arguments[0].T).float() * 100.0
    assert value.dtype == torch.float32
    assert torch.equal(value, wanted)
    for found, exact in zip(torch.autograd.grad(value, arguments[1:]), gradients, strict=True):
        assert torch.equal(found, exact)
    assert (rough - arguments[1] @ arguments[0].T * 100.0).abs().max() > 0.05


def test_bfloat16_embeddings_give_a_float32_loss():
    zimg, ztxt, scale, bias = (a.detach() for a in pairs(8, 16))
    value = sigmoid_loss(zimg.bfloat16(), ztxt.bfloat16(), scale.float(), bias.float())
    assert value.dtype == torch.float32
    exact = sigmoid_loss(zimg.bfloat16().double(), ztxt.bfloat16().double(), scale, bias)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("of_images", "of_texts"),
    [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((3,), (3,)), ((0, 3), (0, 3)), ((1, 2, 3), (1, 2, 3))],
)
def test_shapes_that_are_no_batch_of_pairs_raise(of_images, of_texts):
    with pytest.raises(ValueError, match=r"two \(B, D\) tensors of one shape"):
        sigmoid_loss(torch.zeros(of_images), torch.zeros(of_texts), torch.tensor(10.0), torch.tensor(-10.0))


@pytest.mark.parametrize("through_ddp", [False, True], ids=["by hand", "DDP"])
@pytest.mark.parametrize("size", RANKS)
def test_ranks_train_like_one(ranks, size, through_ddp):
    """The mean over ranks of every gradient, t' and b included, is that of one process on the global batch."""
    assert_same(ranks[size, through_ddp], one_process())


def test_every_rank_ends_with_the_same_gradients(ranks):
    assert_same(ranks["last"], one_process())


def test_the_comparison_would_notice_positives_without_the_rank_offset(ranks):
    """A control: the loss that pairs every rank's texts with the first rank's images must not pass."""
    wanted = one_process()
    with pytest.raises(AssertionError):
        assert_same(ranks["wrong"], wanted)
    assert abs(ranks["wrong"]["loss"] - wanted["loss"]) > 1e-3


def test_a_step_lowers_the_loss():
    """The gradient points uphill, also for t' and b."""
    model, zimg, ids = model_and_batch()
    before = model(zimg, ids)
    before.backward()
    for parameter in model.parameters():
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, q in zip(moved.parameters(), model.parameters(), strict=True):
                if q is parameter:
                    p.sub_(1e-3 * q.grad)
        assert moved(zimg, ids) < before
