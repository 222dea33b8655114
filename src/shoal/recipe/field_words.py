"""What users of other tools type for a key of a recipe, and what it is here."""

from __future__ import annotations

_ROWS = {
    "model": "base_model model_args model_id model_name model_name_or_path pretrained pretrained_model_name_or_path",
    "run_dir": "output_dir output_path out_dir save_dir run_name wandb_name",
    "revision": "model_revision",
    "seed": "random_seed data_seed",
    "num_processes": "num_ranks nproc nproc_per_node num_gpus n_gpus world_size",
    "attn_implementation": "attention_type flash_attention flash_attn use_flash_attn use_flash_attention_2 "
    "sdp_attention xformers_attention",
    "dtype": "torch_dtype teacher_dtype",
    "measure.data": "calibration_data calibration_dataset dataloader",
    "measure.num_tokens": "calibration_tokens num_calibration_samples nsamples",
    "measure.metrics": "importance importance_metric scoring",
    "prune.num_drop": "num_layers_to_remove num_layers_to_prune num_layers_to_drop n_layers_to_drop num_layers",
    "prune.drop": "layer_indices layers_to_remove layers_to_drop layers_to_prune drop_layers layers_to_skip",
    "prune.ratio": "depth_pruning_percentage pruning_percentage pruning_ratio prune_ratio sparsity",
    "prune.changes": "compensate compensation width neuron_selection_method pruning_method expansion_rate",
    "prune.changes.width.intermediate_size": "ffn_hidden_size mlp_channels expansion_divisor",
    "prune.changes.width.num_key_value_heads": "kv_groups num_query_groups",
    "distill.data": "dataset datasets dataset_name dataset_path data_path train_dataset train_file train_files",
    "distill.data.name": "dataset_config dataset_config_name subset",
    "distill.data.split": "dataset_split dataset_train_split train_split",
    "distill.data.column": "dataset_text_field text_column text_field field_messages",
    "distill.data.generate": "generation gen_kwargs",
    "distill.num_tokens": "num_train_epochs num_epochs epochs max_steps max_tokens max_train_tokens",
    "distill.sequence_length": "max_length max_seq_length max_seq_len model_max_length sequence_len seq_len seqlen "
    "cutoff_len block_size",
    "distill.batch_size": "global_batch_size total_batch_size train_batch_size gradient_accumulation_steps",
    "distill.packing": "sample_packing packing_strategy",
    "distill.losses": "loss loss_type kd_loss kl_type distillation_loss criterion",
    "distill.losses.forward_kl.temperature": "kd_temperature distillation_temperature",
    "distill.losses.forward_kl.weight": "kd_alpha kd_ratio distillation_alpha loss_weight",
    "distill.teacher": "teacher_model teacher_model_name_or_path teacher_model_init_kwargs",
    "distill.teacher.recorded.top_k": "loss_top_k logits_top_k",
    "distill.lora": "adapter use_peft peft_config finetuning_type",
    "distill.lora.r": "lora_r lora_rank rank",
    "distill.lora.target_modules": "lora_target_modules lora_target lora_target_linear",
    "distill.lora.load_in_4bit": "load_in_8bit qlora quantization quantization_bit",
    "distill.on_policy.share": "lmbda lambda on_policy_ratio",
    "distill.on_policy.max_new_tokens": "max_completion_length response_length",
    "distill.precision": "bf16 fp16 mixed_precision",
    "distill.deepspeed": "deepspeed_config zero_stage zero_optimization",
    "distill.watch.eval_steps": "eval_strategy evals_per_epoch eval_every val_set_size",
    "distill.watch.metric_for_best_model": "load_best_model_at_end early_stopping_patience",
    "distill.trainer.learning_rate": "lr",
    "distill.trainer.lr_scheduler_type": "lr_scheduler scheduler",
    "distill.trainer.optim": "optimizer",
    "distill.trainer.warmup_steps": "warmup warmup_ratio",
    "distill.trainer.per_device_train_batch_size": "micro_batch_size micro_batch",
    "eval.tasks": "task suite benchmarks",
    "eval.num_fewshot": "num_shots n_shot fewshot",
    "track.wandb": "report_to wandb_mode use_wandb",
    "track.project": "wandb_project",
    "export.hub_repo": "hub_model_id hub_repo_id repo_id push_to_hub",
    "export.private": "hub_private_repo private_repo",
    "export.gguf": "outtype quantization_method",
}
FIELD_WORDS: dict[str, str] = {word: key for key, words in _ROWS.items() for word in words.split()}
"""Word of another tool, in small letters with `_` -> key here."""
_ARGUMENTS = """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval data_seed
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval
    do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start
    eval_steps eval_strategy eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism
    gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push
    hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics
    include_num_input_tokens_seen label_names label_smoothing_factor learning_rate length_column_name
    liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
    logging_first_step logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type
    max_grad_norm max_steps metric_for_best_model neftune_noise_alpha num_train_epochs optim optim_args
    optim_target_modules output_dir parallelism_config per_device_eval_batch_size per_device_train_batch_size
    prediction_loss_only project push_to_hub remove_unused_columns report_to restore_callback_states_from_checkpoint
    resume_from_checkpoint run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit seed
    skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy use_cache use_cpu
    use_liger_kernel warmup_steps weight_decay
"""
TRAINING_ARGUMENTS = frozenset(_ARGUMENTS.split())
"""Fields of transformers.TrainingArguments, which takes seconds to load."""


def field_word(word: str) -> str | None:
    """The key that ``word`` of another tool is here; None = nobody is known to call anything so."""
    word = word.lower().replace("-", "_")
    own = f"distill.trainer.{word}" if word in TRAINING_ARGUMENTS else None
    return FIELD_WORDS.get(word, own)
