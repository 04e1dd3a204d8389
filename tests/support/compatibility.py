# ruff: noqa: E501
"""docs/compatibility.md: what has been tried with converted models, each row beside the test that tries it.

Write the page: `python tests/support/compatibility.py > docs/compatibility.md`
"""

from __future__ import annotations

WORKS, NOT_TRIED = "works", "not tried"
INTRODUCTION = """# Compatibility

What people do with models, folders and data, and what happens here. "Works" means that the result is right: the test beside it
compares it with the dense model or with the converted model before. "Refused" means one line that says what, where and what to do,
before anything is changed.

Which architectures of transformers were converted and loaded in every way is on the page [Architectures](architectures.md).

This page is generated from `tests/support/compatibility.py`. A row without a test has not been tried.
"""

Row = tuple[str, str, str]  # what, what happens, "file::test" below tests/, or nothing

TRAINING: list[Row] = [
    ("EMA and SWA of torch (`AveragedModel`, with and without buffers)", WORKS, "layers/test_codes.py::test_averaged_models_of_torch"),
    ("averages over `state_dict()` (timm's ModelEmaV2), parameters (Polyak, MoCo, DINO), `.data`, vectors, foreach", WORKS,
     "layers/test_codes.py::test_a_model_averaged_with_itself_is_itself"),
    ("averages of models whose codes differ, over buffers or state dicts",
     "refused: … would change N of M RPQ codes, which are indices and not numbers", "layers/test_codes.py::test_models_of_other_codes_are_not_averaged"),
    ("averages of models whose codes differ, over parameters alone", "not noticed: a loop over parameters sees no codes; use `AveragedModel`", ""),
    ("averages of files by sums of `uint8` (they wrap around)", "not noticed: load the files into models, or restore them first", ""),
    ("unfreezing (`requires_grad_`, Lightning, skorch), norms, clipping, noise, LBFGS, `functional_call`", WORKS,
     "layers/test_codes.py::test_parameters_are_what_can_be_trained"),
    ("FSDP1 (both `use_orig_params`), FSDP2, DDP, in training mode or not", "works; with DDP pass `broadcast_buffers=False`, or codes are sent in every step",
     "layers/test_codes.py::test_fully_sharded_and_distributed_models_train"),
    ("deepcopy, pickle, `torch.save`, `share_memory`, casts, `to_empty`", WORKS, "layers/test_codes.py::test_copies_files_and_casts_keep_the_guard"),
    ("`type(torch.float16)` and the like, which cast whole numbers too", "works: codes stay bytes", "layers/test_codes.py::test_a_cast_of_everything_leaves_codes_alone"),
    ("`load_state_dict` of another model, `assign=True`, distributed checkpoints' copies in place", WORKS,
     "layers/test_codes.py::test_codes_ask_for_no_gradient_and_take_what_is_loaded"),
    ("`layer.weight.requires_grad = False`", "works: freezes the codebooks", "layers/test_lazy_weight.py::test_freezing_a_computed_weight_freezes_its_codebooks"),
    ("gradient hooks on a weight before conversion", "the weight stays dense, with the reason", "layers/test_lazy_weight.py::test_a_weight_with_hooks_on_its_gradient_stays_dense"),
    ("gradient hooks on a computed weight", "refused", "layers/test_lazy_weight.py::test_hooks_on_a_computed_weight_are_refused"),
    ("`jacobian(vectorize=True)`, `is_grads_batched`, `jacrev`, `hessian`", WORKS, "layers/test_lazy_weight.py::test_gradients_in_batches_are_those_of_the_dense_model"),
    ("forward-mode derivatives (`forward_ad`, `jvp`, `jacfwd`)", WORKS, "layers/test_lazy_weight.py::test_forward_derivatives_are_those_of_the_dense_model"),
    ("`vmap` over inputs, lookups included", WORKS, "layers/test_lazy_weight.py::test_lookups_are_mapped"),
    ("conversion in `inference_mode`, training later", WORKS, "layers/test_lazy_weight.py::test_what_is_converted_or_restored_in_inference_mode_trains"),
    ("an optimizer made before conversion", "works, with a warning: make the optimizer anew", "running/test_holders.py::test_an_optimizer_made_before_conversion_is_named"),
    ("`torch.compile`, forward and backward", WORKS, "layers/test_compile.py::test_compiled_forward_and_backward_are_those_of_eager_code"),
    ("Trainer of transformers", WORKS, "integrations/test_transformers.py::test_converted_in_memory_trained_saved_and_loaded"),
    ("training in evaluation mode, as Lightning trains a model that was loaded", WORKS, "layers/test_zoo.py::test_adam_trains_what_is_stored_in_fewer_bits"),
    ("Lightning's Trainer: averages, `save_checkpoint`, resumption, mixed precision", WORKS, "integrations/test_trainers.py::test_lightning"),
    ("`load_from_checkpoint` of Lightning", "fails with the names of codes: convert in `configure_model` or the constructor", ""),
    ("skorch: fits, grid search, `save_params`, pickles", WORKS, "integrations/test_trainers.py::test_skorch"),
    ("TRL's `SFTTrainer` and `DPOTrainer`, with and without adapters", WORKS, "integrations/test_trainers.py::test_trl"),
    ("DeepSpeed ZeRO-3", NOT_TRIED, ""),
]  # fmt: skip

PEFT: list[Row] = [
    ("LoRA, rsLoRA, DoRA on linear layers, embeddings, Conv1D and convolutions", WORKS, "integrations/test_peft.py::test_an_adapter_is_saved_and_reloaded"),
    ("prompt, prefix, p-tuning, CPT", WORKS, "integrations/test_peft.py::test_prompts_find_the_word_embeddings"),
    ("`modules_to_save` on a converted head", "works: its codebooks are trained; `rpq.restore(model.lm_head)` first trains the dense weight",
     "integrations/test_peft.py::test_a_converted_head_that_is_saved_trains_its_codebooks_and_a_restored_one_its_weight"),
    ("`trainable_token_indices`, tied heads too, and their merge", WORKS, "integrations/test_peft.py::test_adapted_tokens_are_merged"),
    ("`rpq.convert` of a `PeftModel`", "works: adapters stay dense", "integrations/test_peft.py::test_what_an_adapter_trains_is_not_converted"),
    ("`target_parameters` on converted experts", "refused: … is converted, and PEFT cannot add an adapter to codes",
     "integrations/test_peft.py::test_converted_experts_refuse_an_adapter"),
    ("IA3, OFT, BOFT, VeRA, LoHa, LoKr, AdaLoRA, FourierFT", "trained, saved, loaded and merged by hand; no test", ""),
    ("`merge_adapter`, `merge_and_unload` of PEFT", "refused: call `rpq.merge_adapter`", "integrations/test_peft.py::test_a_plain_merge_is_refused_and_nothing_is_lost"),
    ("`hotswap_adapter`, weighted adapters, `load_adapter` of transformers", "tried by hand; no test", ""),
    ("PiSSA and OLoRA, which change the weight", "raise an error with the first write", ""),
]  # fmt: skip

MODELS: list[Row] = [
    ("`cpu_offload`, `disk_offload`, `dispatch_model` of accelerate; saving such a model", WORKS, "running/test_offload.py::test_an_offloaded_model_computes_and_is_saved"),
    ("a converted folder with a `device_map` of cpu and disk", WORKS, "integrations/test_transformers_habits.py::test_a_folder_on_disk_and_a_conversion_on_load_that_cannot_be_there"),
    ("`save_pretrained` of what `cpu_offload` or `disk_offload` offloaded", "refused: … use rpq.save(model, folder)", "integrations/test_transformers_habits.py::test_a_model_that_is_offloaded_without_a_device_map_is_saved_by_us"),
    ("`RPQConfig` on load with weights on disk", "refused: a device_map with 'disk' does not work while a model is converted on load", "integrations/test_transformers_habits.py::test_a_folder_on_disk_and_a_conversion_on_load_that_cannot_be_there"),
    ("converting or restoring an offloaded model", "refused: … is offloaded by accelerate", "running/test_offload.py::test_an_offloaded_dense_model_is_refused_as_it_is"),
    ("layer classes with ABC, Generic, slots, metaclasses, `__init_subclass__`, frozen attributes", WORKS, "layers/test_surgery.py::test_any_class_of_a_layer_is_converted_and_restored"),
    ("a failure or Ctrl-C half way", "the model is as it was", "layers/test_surgery.py::test_a_conversion_that_fails_half_way_leaves_the_model_as_it_was"),
    ("weights that a list, closure, partial, view, global or hidden module holds too", "stay dense: held by … as well", "running/test_holders.py::test_a_weight_that_something_else_holds_stays_dense_and_loads"),
    ("old-style `weight_norm`, `spectral_norm`, `prune`", "works; removing the hook is refused", "running/test_hooked.py::test_the_computed_weight_is_right_after_conversion_and_after_a_load"),
    ("pruning, deleting or fusing a converted weight, `torch.jit.script`", "refused: … call rpq_convert.restore(model) first",
     "layers/test_lazy_weight.py::test_what_takes_the_weight_away_is_refused_and_changes_nothing"),
    ("`weight.detach().numpy()`", "works: the array is read-only", "layers/test_lazy_weight.py::test_arrays_of_a_weight_are_read_only"),
    ("orthogonal parametrizations", WORKS, "planning/test_slots.py::test_an_orthogonal_weight_follows_its_codes"),
    ("householder parametrizations", "stay dense, with the reason", "planning/test_slots.py::test_householder_reflections_stay_dense"),
    ("linear layers of other libraries (PyTorch Geometric, StyleGAN, own ones)", "works where the class names its sizes; others stay dense, with a warning", "planning/test_slots.py::test_the_axes_of_an_unknown_class_are_those_that_it_names"),
    ("ScriptModules and others of which nothing is converted", "a warning with the reason", "planning/test_slots.py::test_nothing_converted_is_said_with_the_reason"),
    ("lazy modules", "refused: … has no shape yet; run the model once on data first", "layers/test_surgery.py::test_lazy_modules_are_refused_until_they_ran"),
    ("models that torchao, quanto, bitsandbytes or torch.ao quantized", "refused: … is quantized already", "planning/test_quantized.py::test_models_of_other_tools_are_refused_before_anything_is_touched"),
    ("`nn.TransformerEncoder` with padding, partly converted", WORKS, "layers/test_encoders.py::test_padded_inputs_work_whatever_part_is_converted"),
    ("`nn.Linear.forward` or `F.linear` replaced after a conversion", "works: what stands there is called",
     "layers/test_linear_forward.py::test_what_others_put_in_torchs_place_is_called"),
    ("a module with a `weight_rpq` of its own", "its weight stays dense, with the reason", "planning/test_slots.py::test_a_weight_whose_codes_have_no_place_stays_dense"),
    ("sparse inputs, inputs of other dtypes, indices that are no integers", "works, or raises what the dense layer raises",
     "layers/test_operations.py::test_unusual_inputs_give_what_the_dense_layer_gives"),
    ("casts with `torch.__future__.set_swap_module_params_on_conversion(True)`", "fail after the first call: Couldn't swap …; cast before it", ""),
    ("`torch.fx` traces", WORKS, "layers/test_graph_modules.py::test_a_converted_model_is_traced"),
    ("exported modules", "converted by a rule with a view", "layers/test_graph_modules.py::test_an_exported_module_is_converted_by_a_rule"),
    ("`nn.Parameter(layer.weight[:8])`, `Embedding.from_pretrained(layer.weight.data)`", "works: a copy", "layers/test_lazy_weight.py::test_layers_are_made_of_weights"),
    ("`get_extra_state`", "tensors and JSON values are kept, others refused", "checkpoint/test_extra_state.py::test_an_extra_state_is_kept_by_save_and_load"),
    ("masks with infinite values; complex, unsigned and float8 buffers", WORKS, "checkpoint/test_extra_state.py::test_buffers_of_unusual_dtypes_are_kept"),
    ("complex128 and sparse buffers", "converted in memory, refused by `save`", "checkpoint/test_extra_state.py::test_buffers_that_no_file_holds_are_converted_in_memory_and_refused_on_save"),
    ("rows of tiny weights", WORKS, "fit/test_uneven.py::test_tiny_rows_are_kept"),
    ("weights of 1e-41 to 1e38", "works with `scales=\"float32\"`; refused or named with float16's",
     "fit/test_uneven.py::test_every_number_of_float32_is_kept_by_scales_of_float32"),
    ("rows of very uneven weights", WORKS, "fit/test_uneven.py::test_small_weights_keep_their_precision_beside_large_ones"),
]  # fmt: skip

FOLDERS: list[Row] = [
    ("a head that is tied under another name (XLM-RoBERTa, CamemBERT), by every Auto class", WORKS, "integrations/test_tied_names.py::test_every_auto_class_gets_the_table"),
    ("a class that reads one part of a composite (`CLIPVisionModel`, `Llama4ForCausalLM`)", WORKS, "integrations/test_parts.py::test_a_class_that_reads_one_part_of_a_folder"),
    ("a converted folder where rpq-convert is not imported", "transformers fails: a guard has no place", "integrations/test_parts.py::test_where_transformers_does_not_know_rpq_every_part_fails"),
    ("a part is converted, the whole saved; a whole is converted, a part saved", WORKS, "integrations/test_parts.py::test_the_outer_model_saves_what_was_converted_inside"),
    ("a transformers model inside a plain module", WORKS, "integrations/test_parts.py::test_a_model_inside_a_wrapper"),
    ("`torch.compile`d models", WORKS, "integrations/test_parts.py::test_a_compiled_model_is_saved_under_its_own_names"),
    ("compiled submodules, before or after conversion, in factories too", WORKS, "integrations/test_parts.py::test_compiled_submodules_are_saved_under_their_own_names"),
    ("a language model out of a whole that has renamed it (Qwen2-VL)", WORKS, "integrations/test_parts.py::test_a_language_model_out_of_a_whole_that_renamed_it"),
    ("`EncoderDecoderModel.from_encoder_decoder_pretrained`", WORKS, "integrations/test_parts.py::test_encoder_and_decoder_from_converted_folders"),
    ("`save_pretrained` of a model with adapters inside", "refused", "integrations/test_parts.py::test_a_model_with_adapters_in_it_does_not_save_itself"),
    ("`PyTorchModelHubMixin`, saved or loaded", "refused: use `rpq.save` and `rpq.load`", "integrations/test_parts.py::test_a_hub_mixin_refuses"),
    ("timm's `save_for_hf` and `push_to_hf_hub`", "refused: use `rpq.save` and `rpq.load`", "integrations/test_parts.py::test_timm_refuses"),
    ("`SentenceTransformer`: folder or memory, `save_pretrained`, `rpq.save`; its Dense, StaticEmbedding and other modules",
     "works; those modules are saved dense, with a warning", "integrations/test_trainers.py::test_sentence_transformers"),
    ("`CrossEncoder`, `SparseEncoder`: folder or memory, `save_pretrained`, `rpq.save`; a `Router` by its own `save_pretrained`", WORKS,
     "integrations/test_trainers.py::test_other_models_of_sentence_transformers"),
    ("`save_pretrained(variant=…)`", "works in a folder of its own; refused beside other weights, which share its config.json",
     "integrations/test_transformers_habits.py::test_a_variant_has_a_folder_of_its_own"),
    ("`save_pretrained` over an earlier conversion", WORKS, "integrations/test_transformers_habits.py::test_save_pretrained_over_another_model"),
    ("`save_pretrained(state_dict=…)`, such as an average's", "works; refused without all of a weight's tensors",
     "integrations/test_transformers_habits.py::test_a_state_dict_that_is_given_is_what_is_saved"),
    ("`from_pretrained(folder, config=model.config)`", WORKS, "integrations/test_transformers_habits.py::test_the_config_of_a_model_loads_its_folder"),
    ("`quantization_config=None` to an Auto class", "fails, as transformers then drops the description: leave the argument out", ""),
    ("another number of labels (`ignore_mismatched_sizes`)", WORKS, "integrations/test_transformers_habits.py::test_a_head_of_another_size"),
    ("`.half()`, `resize_token_embeddings` to the same size", WORKS, "integrations/test_transformers_habits.py::test_half_float_and_a_size_that_stays"),
    ("weights that stay float32 in a float16 model (T5's `wo`)", WORKS, "integrations/test_transformers_habits.py::test_t5_keeps_its_range"),
    ("classes registered with `AutoModel.register`", WORKS, "hf/test_own_models.py::test_a_registered_class_is_found"),
    ("models with code of their own", "saved with their code, which is never run from a folder", "hf/test_own_models.py::test_a_model_with_its_own_code_is_saved_with_it"),
    ("sentence-transformers folders (`1_Pooling`, `2_Dense`)", "works; a pickled Dense module needs `--allow-pickle`", "checkpoint/test_folder_contents.py::test_a_conversion_copies_what_belongs"),
    ("an output that is its own source, from Python or the command line", "refused: … is or holds the source …",
     "storage/test_room.py::test_a_source_is_not_overwritten"),
    ("links out of a folder, at any depth", "refused: … is a link that leaves the folder", "checkpoint/test_folder_contents.py::test_a_nested_link_out_of_the_folder_is_refused_on_every_road"),
    ("generation settings", WORKS, "checkpoint/test_folder_contents.py::test_settings_of_generation_are_kept_by_save_and_read_by_load"),
    ("folders of several models (`0_Transformer/`, a Router, diffusers pipelines), static embeddings, distributed checkpoints as sources",
     "refused: named, with what helps", "storage/test_recognised.py::test_what_is_no_dense_checkpoint_is_named"),
]  # fmt: skip

SOURCES: list[Row] = [
    ("quantized weights, announced or not (FP8 and int8 with scales, AWQ, GPTQ, bitsandbytes, MXFP4, MLX)", "refused: … is quantized already", "conversion/test_sources.py::test_scales_zero_points_and_packed_weights_are_refused_before_the_first_fit"),
    ("records of other tools (`hf_quant_config.json`, `quantize_config.json`, …)", "refused: FILE says so", "conversion/test_sources.py::test_records_of_other_tools_are_refused"),
    ("a stale index beside a new file", "works: the file that transformers takes", "conversion/test_sources.py::test_a_new_file_beside_a_stale_index_is_taken"),
    ("a head of its own under a tied config", "works, with a warning", "conversion/test_sources.py::test_a_head_of_its_own_under_a_tied_config_is_its_own"),
    ("an adapter's folder", "refused: … merge it into its base", "storage/test_files.py::test_an_adapter_alone_is_no_model"),
    ("GGUF, ONNX, Keras, Flax, TorchScript, archives, Git LFS pointers; diffusers, adapter and tokenizer folders", "refused: named, with what helps", "storage/test_recognised.py::test_what_is_no_dense_checkpoint_is_named"),
    ("an address of the hub", "works: it is read as the id", "storage/test_recognised.py::test_an_address_of_the_hub_is_its_repository"),
    ("factories as `package.module.function` and `file.py:function`", "works", "checkpoint/test_factories.py::test_every_notation_builds_the_model"),
    ("multi-token prediction heads and other parts that the class does not build", "kept, and named", "conversion/test_sources.py::test_parts_that_the_class_does_not_build_are_kept_and_named"),
    ("leftovers such as `masked_bias`", "listed as left out", "conversion/test_sources.py::test_leftovers_of_modules_are_left_out_and_listed"),
    ("a tensor of another shape or kind", "refused before the first fit", "conversion/test_sources.py::test_shapes_and_kinds_are_compared_before_the_first_fit"),
    ("keys that a class fills itself (Marian, BART, MBart, Pegasus, Blenderbot)", WORKS, "conversion/test_sources.py::test_keys_that_transformers_fills_need_not_be_there"),
    ("`torch.save` files: before zip, nested state dicts, prefixes, values beside tensors", WORKS, "storage/test_pickles.py::test_a_state_dict_is_found_and_gives_the_same_bytes"),
    ("several state dicts in one file", "refused until `--state-dict KEY` names one", "storage/test_pickles.py::test_several_state_dicts_are_refused_until_one_is_named"),
    ("whole pickled modules", "refused: … cannot be read as weights only", "storage/test_pickles.py::test_what_is_no_state_dict_is_one_line"),
    ("factories whose constructor looks at weights", "works; refused where they do not fit in memory", "running/test_meta.py::test_constructors_that_look_at_weights_are_built_for_real"),
]  # fmt: skip

INPUTS: list[Row] = [
    ("tensors, ids in one axis, arrays, lists, tuples, dicts, texts, chats, rows, `BatchEncoding`", WORKS, "inputs/test_items.py::test_every_kind_of_data_becomes_token_ids"),
    ("a DataLoader of (inputs, labels)", "works: labels are dropped where forward takes fewer arguments", "inputs/test_items.py::test_labels_of_a_loader_are_no_arguments"),
    ("pictures (PIL, arrays), with the folder's processor", WORKS, "inputs/test_items.py::test_pictures_go_through_a_processor"),
    ("wrong ids, names, dtypes, lengths", "refused: `calibration[1] holds the id 99; … has entries 0 to 19` and the like", "inputs/test_items.py::test_what_cannot_be_an_input_is_said_in_one_line"),
    (".jsonl, .json, .csv files", "works; `--text-field` chooses a column", "inputs/test_tables.py::test_rows_of_json"),
    ("packed texts and tables (.gz), UTF-16, tables with other separators", "works", "inputs/test_found.py::test_texts_and_tables_are_read_and_told"),
    ("chats in files", "works: by the tokenizer's template", "inputs/test_found.py::test_chats_go_through_the_template_of_the_tokenizer"),
    ("folders with subfolders, a README and configs", "works: those are no data", "inputs/test_found.py::test_a_folder_is_read_without_what_tells_of_it"),
    ("a model's folder as data", "refused: … is a model's folder, not data", "inputs/test_found.py::test_a_model_is_no_data"),
    ("data sets of the hub (`hub:user/name`)", "works with datasets", "inputs/test_found.py::test_a_data_set_is_read_by_datasets"),
    (".parquet files", "works with pyarrow", "inputs/test_tables.py::test_parquet"),
    ("RNN, LSTM, GRU and their cells", WORKS, "running/test_weight_reads.py::test_recurrent_layers_are_calibrated"),
    ("convolutions that read one tensor with other kernels, strides, dilations or groups", WORKS, "running/test_weight_reads.py::test_every_reader_of_one_tensor_gets_statistics_of_its_own"),
    ("layers inside `torch.vmap` or a gradient of `torch.func`", WORKS, "running/test_weight_reads.py::test_what_vmap_and_gradients_multiply_is_seen"),
    ("models that keep state or counters", "works: the state is as before", "running/test_state.py::test_nothing_is_left_behind"),
    ("outputs of one number, pictures, whole or complex numbers, in `rpq.evaluate`", "works: figures follow the shape", "evaluation/test_outputs.py::test_figures_follow_the_shape"),
    ("`rpq eval --pairs` with the folder's own pooling", WORKS, "evaluation/test_pooling.py::test_modes"),
    ("pictures with texts (CLIP)", WORKS, "inputs/test_items.py::test_a_dual_encoder_takes_pictures_with_texts"),
    ("`\"self\"`", "synthetic inputs", "inputs/test_items.py::test_self_means_synthetic_inputs_as_on_the_command_line"),
    ("`datasets.Dataset` objects, streams, slices; pairs of texts (tuples, rows, loaders) for cross-encoders", WORKS,
     "inputs/test_items.py::test_every_kind_of_data_becomes_token_ids"),
]  # fmt: skip

GROUPS: dict[str, list[Row]] = {
    "Training habits": TRAINING, "PEFT": PEFT, "Models and modules": MODELS, "Folders and classes that load them": FOLDERS,
    "Sources": SOURCES, "Calibration and evaluation data": INPUTS,
}  # fmt: skip


def page() -> str:
    """Return docs/compatibility.md."""
    parts = [INTRODUCTION]
    for title, rows in GROUPS.items():
        parts.append(f"\n## {title}\n\n| what | what happens | test |\n|---|---|---|\n")
        parts += [f"| {what} | {happens} | {f'`{test}`' if test else '-'} |\n" for what, happens, test in rows]
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
