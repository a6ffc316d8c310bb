"""Heads that a config names and sizes: subspaces of classes, and fixed vectors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import peft_subspace
from models import bert, vit
from peft_subspace import EquiangularHead, GrassmannHead, grow_head

HEADS = {
    "grassmann": {"kind": "grassmann", "classes": 3, "r": 4, "scale": 9.0},
    "equiangular": {"kind": "equiangular", "classes": 3, "dimension": 6},
}
IDS = torch.arange(3, 27).view(4, 6)


def config(kind="grassmann", **options):
    entry = {**HEADS[kind], **options.pop("entry", {})}
    return peft_subspace.FLoRAConfig(
        target_modules=["query"], heads={"classifier": entry}, seed=1, task_type="SEQ_CLS", **options
    )


@pytest.fixture(params=HEADS)
def kind(request):
    return request.param


def adapted(kind, **options):
    return get_peft_model(bert(), config(kind, **options)).eval()


def head_of(model, name="classifier", adapter="default"):
    wrapper = next(m for n, m in model.named_modules() if n.endswith(name) and hasattr(m, "modules_to_save"))
    return wrapper.modules_to_save[adapter]


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


# ---------------------------------------------------------------------------------------------- equations


def grassmann(r=4, classes=5, width=16):
    head = GrassmannHead(width, classes, r=r, scale=7.0).double()
    head.V.data.normal_(generator=torch.Generator().manual_seed(1))
    return head


def features(*size):
    return torch.randn(*size, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_logits_of_subspaces_are_lengths_of_projections():
    """Class by class, by an orthonormal basis that QR makes."""
    head, x = grassmann(), features(6)
    for row, found in zip(x, head(x), strict=True):
        for basis, logit in zip(head.V, found, strict=True):
            q = torch.linalg.qr(basis).Q
            assert logit.item() == pytest.approx(7 * (q.T @ row).norm().item() / row.norm().item(), rel=1e-10)
    assert torch.equal(head(x.view(2, 3, 16)), head(x).view(2, 3, 5))


def test_a_change_of_basis_leaves_logits_and_no_gradient_lies_in_it():
    head, x = grassmann(), features(6)
    before = head(x)
    before.sin().sum().backward()
    inside = head.V.mT @ head.V.grad  # horizontal: a step within the subspace would be one of these
    assert inside.abs().max() < 1e-12
    head.V.data = head.V.data @ torch.randn(5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(head(x), before, rtol=1e-9, atol=1e-9)


def test_logits_are_computed_in_fp32_and_have_gradients_at_zero():
    head = grassmann().float()
    x = features(6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(head(x), head.double()(x.double()).float(), rtol=1e-5, atol=1e-5)
    head = GrassmannHead(16, 1, r=2)
    head.V.data.zero_()[0, 0, 0] = head.V.data[0, 1, 1] = 1.0
    x = torch.zeros(1, 16)
    x[0, 5] = 1.0
    head(x).sum().backward()
    assert head.V.grad.isfinite().all()


def test_vectors_are_orthonormal_as_far_as_dimensions_go_and_apart_beyond():
    for count in (1, 5, 8):
        head = EquiangularHead(4, count, dimension=8)
        head.reset_parameters(torch.Generator().manual_seed(3))
        torch.testing.assert_close(head.vectors @ head.vectors.T, torch.eye(count), rtol=0, atol=1e-6)
    head = EquiangularHead(4, 20, dimension=8)
    head.reset_parameters()
    torch.testing.assert_close(head.vectors.norm(dim=1), torch.ones(20))
    drawn = nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    closest, by_chance = ((v @ v.T).fill_diagonal_(0).abs().max() for v in (head.vectors, drawn))
    assert closest < 0.75 < by_chance


def test_logits_of_fixed_vectors_are_scaled_cosines():
    head = EquiangularHead(16, 3, dimension=6, scale=5.0)
    head.reset_parameters(torch.Generator().manual_seed(3))
    x = features(4).float()
    for row, found in zip(x, head(x), strict=True):
        u = head.linear.weight @ row + head.linear.bias
        for vector, logit in zip(head.vectors, found, strict=True):
            assert logit.item() == pytest.approx(5 * (u @ vector / u.norm()).item(), abs=1e-5)


def test_only_the_map_trains():
    head = EquiangularHead(16, 3, dimension=6)
    assert sum(p.numel() for p in head.parameters()) == 16 * 6 + 6
    assert sum(p.numel() for p in GrassmannHead(16, 3, r=4).parameters()) == 3 * 16 * 4


# ------------------------------------------------------------------------------------------------ adapters


def test_head_takes_the_place_of_the_classifier_and_trains(kind):
    model = adapted(kind).train()
    head = head_of(model)
    assert isinstance(head, {"grassmann": GrassmannHead, "equiangular": EquiangularHead}[kind])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), logits(bert().eval()))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


def test_seed_decides_on_the_first_logits(kind):
    assert torch.equal(logits(adapted(kind)), logits(adapted(kind)))
    other = config(kind)
    other.seed = 2
    assert not torch.equal(logits(adapted(kind)), logits(get_peft_model(bert(), other).eval()))


def test_saved_adapter_loads_in_a_fresh_process_too(kind, tmp_path):
    model = adapted(kind, init_weights=False)
    with torch.no_grad():
        for parameter in head_of(model).parameters():
            parameter.add_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        assert torch.equal(logits(load(bert(), tmp_path).eval()), logits(model))
    torch.save(logits(model), tmp_path / "logits.pt")
    code = (
        "import torch, models, peft_subspace\n"
        f"model = peft_subspace.load(models.bert(), {str(tmp_path)!r}).eval()\n"
        "with torch.no_grad():\n"
        "    found = model(input_ids=torch.arange(3, 27).view(4, 6)).logits\n"
        f"assert torch.equal(found, torch.load({str(tmp_path / 'logits.pt')!r}))\n"
    )
    path = [str(tmp_path.parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_two_adapters_have_heads_of_their_own(kind):
    model = adapted(kind)
    first = logits(model)
    model.add_adapter("other", config("equiangular", entry={"classes": 3}))
    model.set_adapter("other")
    second = logits(model.eval())
    assert not torch.equal(first, second)
    mixed = logits(model, adapter_names=["default", "other", "other", "default"])
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1], second[2], first[3]]))
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_growing_keeps_logits_and_is_saved(tmp_path):
    model = adapted("equiangular")
    before, trained = logits(model), [id(p) for p in model.parameters() if p.requires_grad]
    for classes in (5, 9):  # up to the dimension of 6 they are orthonormal
        grow_head(model, "classifier", classes)
        after = logits(model)
        assert after.shape == (4, classes)
        torch.testing.assert_close(after[:, :3], before)
    assert [id(p) for p in model.parameters() if p.requires_grad] == trained
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft_subspace.load(bert(), tmp_path).eval()), after)


def test_heads_of_vision_models_are_named_by_suffix():
    model = get_peft_model(
        vit(),
        peft_subspace.MoSConfig(
            target_modules=["q_proj", "v_proj"], heads={"classifier": {"kind": "grassmann", "classes": 7}}
        ),
    )
    x = torch.randn(2, 3, 16, 16)
    assert model(pixel_values=x).logits.shape == (2, 7)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (["classifier"], TypeError, r"heads=\['classifier'\] must map names of modules"),
        ({"classifier": {"kind": "linear", "classes": 3}}, ValueError, r"\['kind'\]='linear' must be one of"),
        ({"classifier": {"kind": ["x"], "classes": 3}}, ValueError, r"\['kind'\]=\['x'\] must be one of"),
        ({"classifier": {"kind": "grassmann"}}, ValueError, "must have 'classes'"),
        ({"classifier": {"kind": "grassmann", "classes": 3, "dimension": 4}}, ValueError, "may have 'scale'"),
        (
            {"classifier": {"kind": "grassmann", "classes": 0}},
            ValueError,
            r"\['classes'\]=0 must be at least 1",
        ),
        ({"classifier": {"kind": "grassmann", "classes": 2**30}}, ValueError, "must be at most 1048576"),
    ],
)
def test_other_fields_are_refused(heads, error, message):
    with pytest.raises(error, match=message):
        peft_subspace.FLoRAConfig(heads=heads)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("absent", {}, "heads='absent' names no module of BertForSequenceClassification"),
        (
            "pooler",
            {},
            r"heads\['pooler'\]: bert.pooler is BertPooler, and a head takes the place of a linear",
        ),
        ("classifier", {"r": 17}, r"heads\['classifier'\]: r=17 exceeds in_features=16"),
    ],
)
def test_heads_that_the_model_has_no_place_for_change_nothing(name, entry, message):
    net = bert()
    modules = [*net.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(
            net,
            peft_subspace.FLoRAConfig(
                target_modules=["query"], heads={name: {**HEADS["grassmann"], **entry}}
            ),
        )
    assert [*net.modules()] == modules


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, peft_subspace.load])
@pytest.mark.parametrize(
    "change",
    [
        lambda heads: heads["classifier"].update(classes=4),
        lambda heads: heads["classifier"].update(classes=1000000, r=16),  # nothing of that size is made
        lambda heads: heads.update(classifier=HEADS["equiangular"]),
        lambda heads: heads.clear(),
    ],
    ids=["classes", "huge", "kind", "none"],
)
def test_a_file_that_contradicts_its_config_is_refused(change, load, tmp_path):
    adapted("grassmann").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    change(content["heads"])
    file.write_text(json.dumps(content))
    net = bert()
    modules = [*net.modules()]
    with pytest.raises(ValueError, match=r"classifier|V"):
        load(net, tmp_path)
    assert [*net.modules()] == modules


def test_a_size_that_the_file_contradicts_is_seen_before_anything_is_made(tmp_path):
    adapted("grassmann").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    content["heads"]["classifier"]["classes"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"has classifier.V of shape \(3, 16, 4\), and heads=.* ask for \(7, 16"
    ):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_a_file_without_the_head_is_refused(tmp_path):
    adapted("grassmann").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not k.endswith(".V")}, path)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        with pytest.raises(ValueError, match=r"has no classifier.V"):
            load(bert(), tmp_path)


def test_growing_what_does_not_grow_is_refused():
    model = adapted("grassmann")
    with pytest.raises(ValueError, match=r"name='classifier' must be one of \[\], the equiangular heads"):
        grow_head(model, "classifier", 5)
    model = adapted("equiangular")
    with pytest.raises(ValueError, match="classes=2 must be at least 3"):
        grow_head(model, "classifier", 2)
    assert model.peft_config["default"].heads["classifier"]["classes"] == 3
