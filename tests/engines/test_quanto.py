"""The contract of quantized bases on those of optimum-quanto.

Its tensors cannot be copied by `copy.deepcopy`, nor say how many bytes they have: two tests are left out.
"""

import pytest
from torch import nn

from quantized import Kind, marked
from test_contract_quantized import (  # noqa: F401
    test_adapter_trains_in_floating_point_and_the_base_stays,
    test_all_linear_includes_the_quantized_layer,
    test_default_start_is_the_identity_and_forward_equals_the_dense_oracle,
    test_disabled_adapter_gives_exactly_the_base_output,
    test_each_sample_of_a_batch_gets_its_own_adapter,
    test_exported_lora_gives_the_same_outputs_in_peft,
    test_gradient_passes_the_quantized_layer,
    test_merge_after_an_evaluation_equals_merge_before_it,
    test_merge_and_unload_gives_a_quantized_layer,
    test_merged_weight_is_the_sum_up_to_quantization,
    test_saved_adapter_gives_the_same_outputs_when_loaded,
    test_several_merges_start_from_the_original_weight,
    test_unmerge_restores_the_codes_bit_for_bit,
)

PACKAGE = "optimum"
FEATURE = "optimum-quanto"


def quantizer(weights):
    def quantize(plain: nn.Linear) -> nn.Module:
        from optimum import quanto

        holder = nn.Sequential(plain.requires_grad_(False))
        quanto.quantize(holder, weights=getattr(quanto, weights))
        quanto.freeze(holder)
        return holder[0]

    return quantize


KINDS = [
    Kind("quanto-int8", quantizer("qint8"), FEATURE, 0.01),
    Kind("quanto-int4", quantizer("qint4"), FEATURE, 0.2),
    Kind("quanto-float8", quantizer("qfloat8"), FEATURE, 0.05),
]


@pytest.fixture(params=marked(KINDS))
def kind(request):
    return request.param
