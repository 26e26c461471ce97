"""torch.compile of a model under search: the eager numbers, one graph, compiled once for all mask values."""

import contextlib
import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import ViTConfig, ViTForImageClassification

import upop
from upop.data import Batches, MemorySplit
from upop.evaluation import evaluate

STEPS = 5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler"),
]


def searched(model, forward, *, once=contextlib.nullcontext):
    """Losses and scores of a whole search; `once` is entered around every step but the first."""
    search = upop.Search(model, target=upop.Target(prunable=0.5), steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    source = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        images = torch.randn(4, 3, 16, 16, generator=source)
        labels = torch.randint(5, (4,), generator=source)
        with once() if step else contextlib.nullcontext():
            loss = F.cross_entropy(forward(pixel_values=images).logits, labels)
            (loss + search.penalty()).backward()
        losses.append(loss.detach())
        optimizer.step()
        search.step()
        optimizer.zero_grad()
    return torch.stack(losses), search


def test_a_compiled_search_equals_the_eager_one_and_compiles_once() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    model = ViTForImageClassification(config).train()
    twin = copy.deepcopy(model)
    losses, search = searched(model, model)
    torch.compiler.reset()
    # fullgraph: a break in the graph is an error; the stance: so is a second compilation.
    compiled_losses, compiled_search = searched(
        twin,
        torch.compile(twin, fullgraph=True),
        once=lambda: torch.compiler.set_stance("fail_on_recompile"),
    )
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-5, atol=1e-6)
    state, compiled_state = search.state_dict(), compiled_search.state_dict()
    for name, scores in state["scores"].items():
        torch.testing.assert_close(compiled_state["scores"][name], scores, rtol=1e-3, atol=1e-3)
        assert torch.equal(compiled_state["keep"][name], state["keep"][name])
    assert {value.item() for mask in compiled_state["masks"].values() for value in mask} == {0.0, 1.0}
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_is_evaluated_without_compiling_again(make_model) -> None:
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    model = make_model("vit")
    images = torch.randint(0, 255, (12, 3, 32, 32), dtype=torch.uint8)
    data = Batches(
        MemorySplit(images, torch.arange(12) % 10),
        batch_size=8,
        size=32,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        num_classes=10,
    )
    accelerator = Accelerator(cpu=True)
    plain = evaluate({"model": model}, data, accelerator=accelerator)
    model.compile(backend=backend)
    model(pixel_values=torch.zeros(8, 3, 32, 32))
    before = len(compiled)
    assert before > 0
    # Another mode, another size at the end.
    assert evaluate({"model": model.train()}, data, accelerator=accelerator) == plain
    assert len(compiled) == before
