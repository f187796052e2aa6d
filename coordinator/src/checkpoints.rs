//! `checkpoints`: what a store of them holds, and an adapter out of it, as the published Python scripts load it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use peapod_proto::ids::Step;
use peapod_proto::job::Job;
use peapod_proto::message::ValidationLosses;

use crate::logs;
use crate::store::{Manifest, Store, Validation};

/// The adapter's file in a checkpoint and in the published layout.
const PYTORCH: &str = "pytorch_model.bin";

/// Copies the adapter of the newest checkpoint, or of that of `step`, to `out/proj_0_STEP/pytorch_model.bin`. Returns that path.
///
/// # Errors
/// One line: no such store or checkpoint, a damaged file, or a folder that cannot be written.
pub async fn export(checkpoints: &str, step: Option<u64>, out: &Path) -> Result<PathBuf, String> {
    let store = open(checkpoints)?;
    let manifests = store.list().await.map_err(|error| error.to_string())?;
    let found = match step {
        Some(step) => manifests.iter().rfind(|manifest| manifest.step == Step(step)),
        None => manifests.last(),
    };
    let Some(manifest) = found else {
        let steps: Vec<String> = manifests.iter().map(|manifest| manifest.step.to_string()).collect();
        let has =
            if steps.is_empty() { "it holds no whole checkpoint".into() } else { format!("it holds those of steps {}", steps.join(", ")) };
        let wanted = step.map_or_else(String::new, |step| format!(" of step {step}"));
        return Err(format!("{checkpoints}: there is no checkpoint{wanted}; {has}"));
    };
    let bytes = read(&store, manifest).await?;
    let folder = out.join(format!("proj_0_{}", manifest.step));
    let path = folder.join(PYTORCH);
    let written = std::fs::create_dir_all(&folder).and_then(|()| {
        // Under another name first: a reader never sees half a file.
        let partial = folder.join(format!("{PYTORCH}.partial"));
        std::fs::write(&partial, &bytes)?;
        std::fs::rename(&partial, &path)
    });
    written.map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    Ok(path)
}

fn open(checkpoints: &str) -> Result<Store, String> {
    let folder = checkpoints.strip_prefix("file://").unwrap_or(checkpoints);
    if !folder.contains("://") && !Path::new(folder).is_dir() {
        return Err(format!("{checkpoints}: there is no such folder; --state-dir names the job's, --checkpoints its checkpoint.store"));
    }
    Store::at(checkpoints).map_err(|error| error.to_string())
}

/// The whole checkpoints in a store, oldest first, with the losses on the validation samples by their weights: a line each, or one JSON
/// array. `state_dir` is the job's state folder, where that is known.
///
/// # Errors
/// One line: no such store, or a manifest or a log that cannot be read.
pub async fn list(checkpoints: &str, state_dir: Option<&Path>, json: bool) -> Result<String, String> {
    let store = open(checkpoints)?;
    let manifests = store.list().await.map_err(|error| error.to_string())?;
    let validations = validations(&manifests, state_dir)?;
    let mut rows = Vec::with_capacity(manifests.len());
    for manifest in &manifests {
        let bytes: u64 = manifest.parts.iter().map(|part| part.num_bytes).sum();
        let losses = validations.get(&manifest.step);
        // As the job adds them up.
        let total = losses.and_then(|losses| Some(losses.total(Job::parse(&manifest.job).ok()?.loss.feature_weight)));
        let total = total.filter(|total| total.is_finite());
        rows.push((manifest, bytes, losses, total, store.location(manifest.step, manifest.generation)));
    }
    if json {
        let row = |(manifest, _, losses, total, location): &(&Manifest, u64, Option<&ValidationLosses>, Option<f64>, String)| {
            let Manifest { step, generation, parts, .. } = manifest;
            serde_json::json!({
                "step": step.0, "generation": generation.0, "location": location,
                "validation": losses.map(|losses| Validation::from(*losses)), "validation_total": total, "parts": parts,
            })
        };
        return Ok(format!("{:#}\n", serde_json::Value::from(rows.iter().map(row).collect::<Vec<_>>())));
    }
    let mut text = format!("{:>12}  {:>10}  {:>10}  {}\n", "step", "validation", "MB", "location");
    for (manifest, bytes, _, total, location) in &rows {
        let total = total.map_or_else(|| "-".to_owned(), |total| format!("{total:.4}"));
        let _ = writeln!(text, "{:>12}  {total:>10}  {:>10.1}  {location}", manifest.step.0, *bytes as f64 / 1e6);
    }
    Ok(if manifests.is_empty() { format!("{checkpoints}: no whole checkpoint\n") } else { text })
}

/// The newest validation of each step. A manifest is written before its own weights are validated: it has that of an earlier checkpoint,
/// and the newest stand in the log only.
fn validations(manifests: &[Manifest], state_dir: Option<&Path>) -> Result<BTreeMap<Step, ValidationLosses>, String> {
    let kept = manifests.iter().filter_map(|manifest| manifest.validation);
    let mut validations: BTreeMap<_, _> = kept.map(|losses| (losses.step, losses.into())).collect();
    if let Some(state_dir) = state_dir {
        let insert = |losses: ValidationLosses, _| _ = validations.insert(losses.step, losses);
        logs::for_validations(state_dir, insert).map_err(|error| format!("{error:#}"))?;
    }
    Ok(validations)
}

async fn read(store: &Store, manifest: &Manifest) -> Result<bytes::Bytes, String> {
    let location = store.location(manifest.step, manifest.generation);
    if !manifest.parts.iter().any(|part| part.name == PYTORCH) {
        return Err(format!("{location} has no {PYTORCH}: it was written by an older version; resume the job for a step to get one"));
    }
    store.read(manifest, PYTORCH).await.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use peapod_proto::ids::Generation;

    use super::*;
    use crate::core::ledger::Ledger;
    use crate::store::{Part, sha256};

    fn address(folder: &Path) -> &str {
        folder.to_str().unwrap()
    }

    async fn checkpoint(folder: &Path, step: u64, content: &'static [u8]) {
        validated(folder, step, content, None).await;
    }

    /// A checkpoint that was sealed when this validation was known.
    async fn validated(folder: &Path, step: u64, content: &'static [u8], validation: Option<Validation>) {
        let store = Store::local(folder).unwrap();
        let (step, generation) = (Step(step), Generation(1));
        let mut writer = store.begin_part(step, generation, PYTORCH).await.unwrap();
        writer.write(bytes::Bytes::from_static(content)).await.unwrap();
        writer.finish().await.unwrap();
        let parts = vec![Part { name: PYTORCH.into(), num_bytes: content.len() as u64, sha256: hex::encode(sha256(content)) }];
        let job = peapod_proto::job::TEMPLATE.to_owned();
        let manifest = Manifest { format: Manifest::FORMAT, step, generation, job, shards: Vec::new(), parts, validation };
        store.seal(manifest, &Ledger::new(1)).await.unwrap();
    }

    #[tokio::test]
    async fn adapter_goes_where_the_python_scripts_look_for_it() {
        let (store, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        checkpoint(store.path(), 9, b"old").await;
        checkpoint(store.path(), 49_999, b"new").await;
        let path = export(address(store.path()), None, out.path()).await.unwrap();
        assert_eq!(path, out.path().join("proj_0_49999/pytorch_model.bin"));
        assert_eq!(std::fs::read(path).unwrap(), b"new");
        assert_eq!(std::fs::read(export(address(store.path()), Some(9), out.path()).await.unwrap()).unwrap(), b"old");
    }

    #[tokio::test]
    async fn list_says_what_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        assert!(list(address(folder.path()), None, false).await.unwrap().ends_with("no whole checkpoint\n"));
        checkpoint(folder.path(), 9, b"old").await;
        checkpoint(folder.path(), 49_999, b"new").await;
        let text = list(address(folder.path()), None, false).await.unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 3 && lines[2].contains("49999") && lines[2].ends_with("step-000049999-g000001"), "{text}");
        let all: serde_json::Value = serde_json::from_str(&list(address(folder.path()), None, true).await.unwrap()).unwrap();
        assert_eq!((&all[0]["step"], &all[1]["parts"][0]["num_bytes"]), (&9.into(), &3.into()));
    }

    #[tokio::test]
    async fn losses_stand_beside_the_weights_that_were_validated() {
        let folder = tempfile::tempdir().unwrap();
        let losses = |step: u64, task: f32| ValidationLosses { step: Step(step), samples: 3, task, logit: 0.0, feature: 0.0 };
        checkpoint(folder.path(), 10, b"one").await;
        validated(folder.path(), 20, b"two", Some(losses(10, 0.5).into())).await;
        validated(folder.path(), 30, b"three", Some(losses(20, f32::NAN).into())).await;
        let text = list(address(folder.path()), None, false).await.unwrap();
        let columns = |text: &str| text.lines().skip(1).map(|line| line.split_whitespace().nth(1).unwrap().to_owned()).collect::<Vec<_>>();
        assert_eq!(columns(&text), ["0.5000", "-", "-"], "{text}");
        let log = folder.path().join(logs::VALIDATIONS);
        let line = |step: u64, task: f64| {
            serde_json::json!({ "step": step, "samples": 3, "task": task, "logit": 0.0, "feature": 0.0, "total": task }).to_string() + "\n"
        };
        std::fs::write(&log, [line(20, 0.3), line(30, 0.9), line(30, 0.25)].concat()).unwrap();
        let text = list(address(folder.path()), Some(folder.path()), false).await.unwrap();
        assert_eq!(columns(&text), ["0.5000", "0.3000", "0.2500"], "{text}");
        let all: serde_json::Value = serde_json::from_str(&list(address(folder.path()), Some(folder.path()), true).await.unwrap()).unwrap();
        assert_eq!((&all[2]["validation"]["step"], &all[2]["validation_total"]), (&30.into(), &0.25.into()));
    }

    #[tokio::test]
    async fn what_cannot_be_exported_is_named() {
        let (store, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert!(export(address(&store.path().join("none")), None, out.path()).await.unwrap_err().contains("no such folder"));
        assert!(export(address(store.path()), None, out.path()).await.unwrap_err().contains("no whole checkpoint"));
        checkpoint(store.path(), 9, b"old").await;
        assert!(
            export(address(store.path()), Some(8), out.path())
                .await
                .unwrap_err()
                .contains("no checkpoint of step 8; it holds those of steps 9")
        );
        std::fs::write(store.path().join("step-000000009-g000001/pytorch_model.bin"), b"bad").unwrap();
        let error = export(address(store.path()), None, out.path()).await.unwrap_err();
        assert!(error.contains("is damaged: pytorch_model.bin does not have the manifest's SHA-256"), "{error}");
    }
}
