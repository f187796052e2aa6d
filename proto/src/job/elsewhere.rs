//! Keys that a job file has in another section, or that other trainers call otherwise.

use super::reference::sections;

/// What other trainers call a thing, and where it is said here: keys in backticks, all of which exist.
const FOREIGN: &[(&[&str], &str)] = &[
    (&["lr", "max_lr", "base_lr"], "`train.learning_rate`"),
    (&["min_lr", "end_lr", "lr_end"], "`train.final_learning_rate`"),
    (&["lr_scheduler", "lr_scheduler_type", "scheduler"], "`train.decay`"),
    (&["lr_warmup_steps", "num_warmup_steps", "warmup"], "`train.warmup_steps`"),
    (
        &["batch_size", "batch", "train_batch_size", "per_device_train_batch_size"],
        "`train.global_batch` (of all workers together) or `train.micro_batch` (what one computes at once)",
    ),
    (
        &["gradient_accumulation_steps", "gradient_accumulation", "grad_accum_steps", "accumulate_grad_batches"],
        "`train.global_batch`: a worker computes its share of it in as many parts of `train.micro_batch` as needed",
    ),
    (&["max_steps", "num_steps", "max_train_steps", "train_steps", "total_steps", "num_train_steps", "iterations"], "`train.steps`"),
    (&["num_epochs", "max_epochs", "num_train_epochs", "max_train_epochs"], "`train.epochs`"),
    (&["precision", "mixed_precision", "torch_dtype", "amp", "fp16", "bf16"], "`train.dtype`"),
    (&["adam_beta1", "adam_beta2", "beta1", "beta2"], "`train.betas`"),
    (&["adam_epsilon", "eps"], "`train.epsilon`"),
    (&["adam_weight_decay"], "`train.weight_decay`"),
    (&["grad_clip", "clip_grad_norm", "gradient_clip_val", "gradient_clipping"], "`train.max_grad_norm`"),
    (&["ema", "use_ema", "ema_rate"], "`train.ema_decay`"),
    (&["snr_gamma"], "`loss.min_snr_gamma`"),
    (&["proportion_empty_prompts", "caption_dropout", "caption_dropout_rate"], "`loss.condition_dropout`"),
    (&["resolution", "image_size", "width", "height"], "`data.buckets`, a list of [width, height]"),
    (&["num_workers", "dataloader_num_workers", "loader_workers"], "`data.decode_threads`"),
    (&["train_data", "train_data_dir", "data_dir", "data_path", "dataset", "dataset_name", "train_shards_path_or_url"], "`data.shards`"),
    (&["caption_column", "caption_key"], "`data.captions.native_keys` or `data.captions.parallel_key`"),
    (&["pretrained_model_name_or_path", "model_name_or_path", "model_path", "base_model", "teacher"], "`model.path`"),
    (&["pretrained_vae_model_name_or_path", "vae"], "`model.path`: the autoencoder is the model's own"),
    (&["text_encoder", "text_encoder_path", "encoder"], "`student.path`"),
    (&["max_length", "max_seq_length", "model_max_length", "max_token_length"], "`student.context_length`"),
    (&["save_steps", "save_every", "checkpointing_steps", "checkpoint_every", "save_every_n_steps"], "`checkpoint.every_steps`"),
    (&["save_total_limit", "checkpoints_total_limit"], "`checkpoint.keep`"),
    (
        &["output_dir", "output_path", "save_dir", "logging_dir"],
        "`checkpoint.store`, or --state-dir of the coordinator, which is where all else goes",
    ),
    (&["eval_steps", "validation_steps", "validation_epochs"], "`validation.every_steps`"),
    (&["validation_prompt", "validation_prompts", "sample_prompts"], "`pictures.prompts`"),
];

/// Where a key that a section does not have may be said instead, in words that follow "did you mean".
pub(super) fn place_of(unknown: &str) -> Option<String> {
    let foreign = FOREIGN.iter().find(|(names, _)| names.contains(&unknown));
    if let Some((_, place)) = foreign {
        return Some((*place).to_owned());
    }
    let full = |section: &str| if section.is_empty() { format!("`{unknown}`") } else { format!("`{section}.{unknown}`") };
    let places = sections().into_iter().filter(|(_, keys)| keys.contains(&unknown)).map(|(section, _)| full(section));
    Some(places.collect::<Vec<_>>().join(" or ")).filter(|places| !places.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn places_exist_and_no_name_has_two() {
        let sections = sections();
        let exists = |key: &str| {
            let (section, key) = key.rsplit_once('.').unwrap_or(("", key));
            sections.iter().any(|(name, keys)| *name == section && keys.contains(&key))
        };
        let mut seen = BTreeSet::new();
        for (names, place) in FOREIGN {
            for key in place.split('`').skip(1).step_by(2) {
                assert!(exists(key), "{key}");
            }
            assert!(names.iter().all(|name| seen.insert(*name)), "{names:?}");
        }
    }

    #[test]
    fn key_of_another_section_is_told_with_it() {
        assert_eq!(place_of("micro_batch").as_deref(), Some("`train.micro_batch`"));
        assert_eq!(place_of("dtype").as_deref(), Some("`train.dtype` or `loss.dtype`"));
        assert_eq!(place_of("max_steps").as_deref(), Some("`train.steps`"));
        assert_eq!(place_of("warmup_stepz"), None);
    }
}
