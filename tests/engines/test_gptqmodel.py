"""The contract of weights that can only be run, on GPTQModel's layers for GPTQ and AWQ.

Random initialization is left out: scales are fp16 here, and some adapters are drawn in the layer's type.
"""

import pytest
import torch

from test_contract_forward_only import (  # noqa: F401
    saved,
    test_adapter_of_the_unquantized_model_is_loaded_and_trained,
    test_all_linear_includes_the_layer,
    test_default_start_is_the_identity_or_asks_for_a_weight,
    test_each_sample_of_a_batch_gets_its_own_adapter,
    test_exported_lora_has_the_same_update,
    test_gradient_passes_the_layer,
    test_merging_says_why_it_cannot_and_changes_nothing,
    test_next_task_is_refused_before_anything_is_changed,
    test_reading_the_weight_is_an_error_that_names_the_layer_type,
)

pytestmark = [
    pytest.mark.feature("GPTQ, AWQ by GPTQModel (forward only)"),
    pytest.mark.filterwarnings("ignore"),  # the library's own
]


def packer(module, name):
    """Function with the name of a class, which packs a linear layer by rounding to 4 bits."""

    def pack(plain):
        cls = getattr(pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{module}"), name)
        (outputs, inputs), scales = plain.weight.shape, plain.weight.detach().abs().amax(1, keepdim=True) / 7
        layer = cls(
            bits=4, group_size=inputs, sym=True, desc_act=False, in_features=inputs, out_features=outputs,
            bias=True, pack_dtype=torch.int32,
        )  # fmt: skip
        middle, groups = torch.full_like(scales, 8, dtype=torch.int32), torch.zeros(inputs, dtype=torch.int32)
        layer.pack(plain, scales, middle, g_idx=groups)
        layer.post_init()
        return layer

    pack.__name__ = name
    return pack


@pytest.fixture(params=[("torch", "TorchLinear"), ("torch_awq", "AwqTorchLinear")], ids=["gptq", "awq"])
def kind(request):
    return packer(*request.param)
