"""Every place of PEFT and transformers, below their top level, that the package imports or overrides.

A hook is a dotted path, the names of the arguments that the package relies on, in order, and what it is used
for. `test_hooks.py` compares the list with the packages that are installed, and with this one's own source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hook:
    """One place.

    Attributes:
        path: Module and name, and that of a method behind a class.
        use: What the package does with it.
        arguments: Arguments that it passes or is passed; a newer version may have more behind them.
    """

    path: str
    use: str
    arguments: tuple[str, ...] = ()


TUNERS = "peft.tuners.tuners_utils"
MODEL, LAYER = f"{TUNERS}.BaseTuner", f"{TUNERS}.BaseTunerLayer"
STATE = ("model", "config", "adapter_name", "state_dict")

IMPORTED = [
    Hook("peft.config.PeftConfigMixin", "configs are read from files"),
    Hook("peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING", "a method is registered again after a reload"),
    Hook("peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING", "a method is registered again after a reload"),
    Hook("peft.tuners._buffer_dict.BufferDict", "buffers by adapter, which a refused load takes back"),
    Hook(MODEL, "tuner models are subclasses"),
    Hook(LAYER, "tuner layers are subclasses"),
    Hook(f"{TUNERS}._get_in_out_features", "sizes of quantized layers", ("module",)),
    Hook(f"{TUNERS}._maybe_include_all_linear_layers", '"all-linear"', ("peft_config", "model")),
    Hook(f"{TUNERS}.check_adapters_to_merge", "which adapters a merge is for", ("module", "adapter_names")),
    Hook(f"{TUNERS}.onload_layer", "layers that are offloaded are fetched to be merged", ("layer",)),
    Hook("peft.utils.CONFIG_NAME", "name of an adapter's config"),
    Hook("peft.utils.SAFETENSORS_WEIGHTS_NAME", "name of an adapter's file"),
    Hook("peft.utils.WEIGHTS_NAME", "name of an adapter's older file"),
    Hook("peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "default target_modules"),
    Hook("peft.utils.constants.DUMMY_TARGET_MODULES", "a merged task keeps its heads alone"),
    Hook("peft.utils.constants.INCLUDE_LINEAR_LAYERS_SHORTHAND", '"all-linear"'),
    Hook("peft.utils.get_quantization_kwargs", "how a model was quantized", ("model",)),
    Hook("peft.utils.other.AuxiliaryTrainingWrapper", "heads (modules_to_save)"),
    Hook("peft.utils.other.ModulesToSaveWrapper", "heads that a config names take the place of the model's"),
    Hook("peft.utils.quantization_extra_repr", "layers say how they are quantized", ("module",)),
    Hook("peft.utils.quantization_utils.ForwardOnlyQuantizationBackend", "weights that can only be run"),
    Hook("peft.utils.quantization_utils.QuantizationBackend", "quantized weights are read and written"),
    Hook("peft.utils.quantization_utils.TorchaoBackend", "torchao's weights without settings refuse a merge"),
    Hook("peft.utils.register_peft_method", "registration", ("name", "config_cls", "model_cls", "prefix")),
    Hook("peft.utils.resolve_quantization_backend", "how a layer is quantized", ("base_layer",)),
    Hook(
        "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
        "names of layers that PEFT takes for fused experts",
        ("peft_config", "model", "conversions"),
    ),
    Hook("transformers.loss.loss_utils.ForCausalLMLoss", "which labels a batch counts"),
    Hook("transformers.loss.loss_utils.LOSS_MAPPING", "which labels a batch counts"),
    Hook("transformers.pytorch_utils.Conv1D", "a kind of layer"),
]

OVERRIDDEN = [
    Hook("peft.config.PeftConfigMixin.save_pretrained", "files say their format", ("save_directory",)),
    Hook("peft.config.PeftConfigMixin.to_dict", "files leave out what only a session needs"),
    Hook(
        f"{MODEL}._cast_adapter_dtype", "what must stay fp32 does", ("adapter_name", "autocast_adapter_dtype")
    ),
    Hook(f"{MODEL}._check_merge_allowed", "merges are refused before anything changes"),
    Hook(
        f"{MODEL}._check_target_module_exists",
        "what makes a weight of other tensors is no target",
        ("peft_config", "key"),
    ),
    Hook(
        f"{MODEL}._create_and_replace",
        "a module gets its tuner layer",
        ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
    ),
    Hook(f"{MODEL}._get_adapter_state_dict", "files hold what inference needs", STATE),
    Hook(f"{MODEL}._mark_only_adapters_as_trainable", "frozen adapters stay frozen", ("model",)),
    Hook(
        f"{MODEL}._prepare_model",
        "an injection is planned before it changes anything",
        ("peft_config", "model"),
    ),
    Hook(f"{MODEL}._remap_adapter_state_dict_for_load", "adapters are checked, and older files read", STATE),
    Hook(f"{MODEL}._remove_adapter_name_from_key", "keys of files", ("key", "adapter_name")),
    Hook(
        f"{MODEL}._replace_module",
        "nothing else of a module changes",
        ("parent", "child_name", "new_module", "child"),
    ),
    Hook(
        f"{MODEL}._unload_and_optionally_merge",
        "merge_and_unload",
        ("merge", "progressbar", "safe_merge", "adapter_names"),
    ),
    Hook(f"{MODEL}.enable_adapter_layers", "adapters that are merged are not added twice"),
    Hook(f"{MODEL}.inject_adapter", "an injection that fails leaves nothing", ("model", "adapter_name")),
    Hook(f"{MODEL}.merge_adapter", "merges show their progress", ("adapter_names", "safe_merge")),
    Hook(
        f"{LAYER}._get_base_layer_device_and_dtype", "layers without a weight of their own", ("base_layer",)
    ),
    Hook(
        f"{LAYER}._move_adapter_to_device_of_base_layer",
        "adapters follow their layer",
        ("adapter_name", "device"),
    ),
    Hook(f"{LAYER}.delete_adapter", "what else is kept of an adapter goes too", ("adapter_name",)),
    Hook(f"{LAYER}.enable_adapters", "disabled adapters are taken out of the weight", ("enabled",)),
    Hook(f"{LAYER}.get_base_weight", "weights are read"),
    Hook(f"{LAYER}.merge", "merging", ("safe_merge", "adapter_names")),
    Hook(f"{LAYER}.set_adapter", "frozen adapters stay frozen", ("adapter_names", "inference_mode")),
    Hook(f"{LAYER}.set_base_weight", "weights are written", ("weight_data",)),
    Hook(f"{LAYER}.supports_lora_conversion", "PEFT's conversion to LoRA", ("adapter_name",)),
    Hook(f"{LAYER}.unmerge", "merging"),
    Hook(f"{LAYER}.weight", "a model that reads the weight gets the adapted one"),
]
