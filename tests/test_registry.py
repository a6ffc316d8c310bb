"""The methods' places in PEFT's registry."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method
from torch import nn

from methods import METHODS
from peft_subspace.tuner.registry import peft_type, register


def run_python(code, *arguments):
    """Run a script in a fresh process; fails with its output if it does."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_type_is_a_member_of_pefts_enum(method):
    name = method.config_cls.peft_type_name
    member = getattr(PeftType, name)
    assert isinstance(member, PeftType)
    assert member is PeftType(name)
    assert member is PeftType[name]
    assert member is method.config_cls().peft_type
    assert member.name == member.value == name == str(member.value)
    assert list(PeftType).count(member) == 1
    assert member in set(PeftType)
    assert hash(member) == hash(PeftType[name])
    assert repr(member) == f"<PeftType.{name}: '{name}'>"
    assert member == name
    assert PeftType.LORA.value == "LORA"


def test_type_survives_pickle_and_copies(method):
    member = PeftType[method.config_cls.peft_type_name]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.deepcopy(member) is member
    assert copy.copy(member) is member


def test_maps_of_peft_know_the_method(method):
    name = method.config_cls.peft_type_name
    member, tuner = PeftType[name], PEFT_TYPE_TO_TUNER_MAPPING[name]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is method.config_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == tuner.prefix == f"{name.lower()}_" == method.prefix


def test_prefix_is_not_part_of_another_methods(method):
    others = [prefix for name, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix != method.prefix]
    assert not [prefix for prefix in others if method.prefix in prefix]
    assert f".{method.prefix}" not in "".join(f".{prefix}" for prefix in others)


def test_asking_for_a_type_twice_gives_the_same_member():
    assert peft_type("LORA") is PeftType.LORA
    count = len(PeftType)
    assert peft_type("LORA") is peft_type("LORA")
    assert len(PeftType) == count


def test_registering_again_is_harmless(method):
    name = method.config_cls.peft_type_name
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[name]
    register(name, method.config_cls, tuner)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is method.config_cls
    assert PEFT_TYPE_TO_TUNER_MAPPING[name] is tuner


def test_name_that_peft_has_taken_is_refused_and_nothing_is_overwritten(method):
    class Foreign(PeftConfig):
        pass

    name = method.config_cls.peft_type_name
    known, tuner = PEFT_TYPE_TO_CONFIG_MAPPING[name], PEFT_TYPE_TO_TUNER_MAPPING[name]
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = Foreign
    try:
        with pytest.raises(ImportError, match=rf"peft_type='{name}' is already taken by .*Foreign.*install"):
            register(name, method.config_cls, tuner)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is Foreign
        assert PEFT_TYPE_TO_TUNER_MAPPING[name] is tuner
    finally:
        PEFT_TYPE_TO_CONFIG_MAPPING[name] = known


def test_one_of_pefts_own_methods_is_never_overwritten(method):
    known = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]
    with pytest.raises(ImportError, match="'LORA' is already taken by peft"):
        register("LORA", method.config_cls, PEFT_TYPE_TO_TUNER_MAPPING[method.config_cls.peft_type_name])
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is known
    with pytest.raises(KeyError, match="There is already"):
        register_peft_method(name="lora", config_cls=known, model_cls=nn.Module)


def test_reloading_the_package_twice_is_harmless():
    run_python(
        """
        import importlib, pickle, sys, torch
        import peft_subspace
        from peft import PeftType, get_peft_model
        before = list(PeftType)
        for _ in range(2):
            for name in [n for n in list(sys.modules) if n.split(".")[0] == "peft_subspace"]:
                importlib.reload(sys.modules[name])
        for name in [n for n in list(sys.modules) if n.split(".")[0] == "peft_subspace"]:
            del sys.modules[name]
        import peft_subspace
        assert list(PeftType) == before
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model = get_peft_model(model, peft_subspace.FLoRAConfig(target_modules=["0"]))
        assert isinstance(model.base_model, peft_subspace.FLoRAModel)
        model(torch.ones(1, 4)).sum().backward()
        assert PeftType("FLORA") is pickle.loads(pickle.dumps(PeftType.FLORA))
        """
    )


def test_import_refuses_a_name_that_another_package_took():
    run_python(
        """
        import aenum, peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        from peft.utils import register_peft_method

        aenum.extend_enum(peft.PeftType, "FLORA", "FLORA")
        class Config(peft.PeftConfig): ...
        class Model(peft.tuners.lora.LoraModel): prefix = 'theirs_'
        register_peft_method(name="flora", config_cls=Config, model_cls=Model, prefix="theirs_")
        try:
            import peft_subspace
        except ImportError as error:
            assert "already taken" in str(error) and "Config" in str(error), error
        else:
            raise SystemExit("imported")
        assert PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"] is Config
        assert PEFT_TYPE_TO_TUNER_MAPPING["FLORA"] is Model
        """
    )


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a fresh process made of an adapter of each method, before and after the import."""
    folder = tmp_path_factory.mktemp("fresh")
    for method in METHODS:
        torch.manual_seed(0)
        config = method.config(target_modules=["0"], init_weights=False)
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(folder / method.name)
    run_python(
        """
        import json, pathlib, sys, torch
        from peft import PeftConfig, PeftModel
        folder = pathlib.Path(sys.argv[1])
        def base():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(4, 4))
        loaders = (PeftConfig.from_pretrained, lambda path: PeftModel.from_pretrained(base(), path))
        found = {path.name: {"refused": 0} for path in folder.iterdir()}
        for name in found:
            for load in loaders:
                try:
                    load(folder / name)
                except KeyError:
                    found[name]["refused"] += 1
        import peft_subspace
        for name in found:
            model, x = PeftModel.from_pretrained(base(), folder / name), torch.ones(1, 4)
            changed = model(x)
            with model.disable_adapter():
                found[name]["changes"] = not torch.equal(changed, model(x))
        (folder / "found.json").write_text(json.dumps(found))
        """,
        folder,
    )
    return json.loads((folder / "found.json").read_text())


@pytest.mark.feature("loads in a fresh process after `import peft_subspace`")
def test_adapter_needs_the_import_and_loads_in_a_fresh_process_with_it(method, fresh):
    assert fresh[method.name] == {"refused": 2, "changes": True}
