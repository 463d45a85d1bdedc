"""What siglit relies on in torch: each test fails where torch changes what one function reaches into."""

import torch
from torch.utils.data import DataLoader

from siglit.runtime.torch_internals import end_persistent_workers, end_workers, graph_is_kept, storage_id
from tests.ranks import other_processes


def numbers(**options):
    return DataLoader(range(8), batch_size=None, num_workers=1, **options)


def test_workers_end_while_their_iterator_is_held():
    items = iter(numbers())
    assert next(items) == 0
    assert len(other_processes()) == 1
    end_workers(items)
    assert not other_processes()


def test_persistent_workers_end_and_the_next_pass_starts_new_ones():
    loader = numbers(persistent_workers=True)
    assert list(loader) == list(range(8))
    before = other_processes()
    assert len(before) == 1
    end_persistent_workers(loader)
    assert not other_processes()
    assert list(loader) == list(range(8))
    assert len(other_processes()) == 1
    assert not before & other_processes()
    end_persistent_workers(loader)


def test_a_loader_without_workers_has_none_to_end():
    loader = DataLoader(range(2), batch_size=None)
    end_persistent_workers(loader)
    assert list(loader) == [0, 1]


def test_the_backward_pass_says_whether_its_graph_is_kept():
    """The loss scales its gradients in place where it is not."""
    kept = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            kept.append(graph_is_kept())
            return gradient

    value = Ask.apply(torch.ones((), requires_grad=True))
    value.backward(retain_graph=True)
    value.backward()
    assert kept == [True, False]


def test_a_storage_has_one_id_and_different_ones_differ():
    tensor, other = torch.zeros(4), torch.zeros(4)
    assert storage_id(tensor.untyped_storage()) == storage_id(tensor[1:].view(3).untyped_storage())
    assert storage_id(tensor.untyped_storage()) != storage_id(other.untyped_storage())
