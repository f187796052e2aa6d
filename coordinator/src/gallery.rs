//! Pictures drawn while training: a folder for each step, a file for each prompt, and a list of which is which.
//!
//! ```text
//! pictures/step-000001000/00.png
//!                         01.png
//!                         pictures.json
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use peapod_proto::ids::{Generation, Step};
use peapod_proto::job::Job;
use tokio::sync::Mutex;

/// Size of one picture: far above any that a model draws, far below the memory of a coordinator.
pub const MAX_PNG_BYTES: usize = 64 << 20;
/// What every PNG begins with.
const PNG_SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// The list of a step's pictures.
const LIST: &str = "pictures.json";

/// Why a picture is not kept.
#[derive(Debug, thiserror::Error)]
pub enum GalleryError {
    /// The job has no such prompt.
    #[error("there is no prompt {index}: pictures.prompts has {num_prompts}")]
    NoSuchPrompt {
        /// The place asked for.
        index: u32,
        /// Prompts of the job.
        num_prompts: usize,
    },
    /// Something else than a picture.
    #[error("the bytes are no PNG")]
    NotPng,
    /// Too many bytes.
    #[error("the picture has {got} bytes, at most {MAX_PNG_BYTES} are kept")]
    TooLarge {
        /// Their number.
        got: usize,
    },
    /// The step was trained and drawn again meanwhile.
    #[error("pictures of step {step} are there from {kept}, this one is from {got}")]
    Older {
        /// The step.
        step: Step,
        /// Generation of those that are kept.
        kept: Generation,
        /// Generation of this one.
        got: Generation,
    },
    /// The folder cannot be written.
    #[error("pictures in {root}: {source}")]
    Store {
        /// The folder.
        root: String,
        /// What the system said.
        source: object_store::Error,
    },
}

/// Keeps pictures in a folder.
#[derive(Debug, Clone)]
pub struct Gallery {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// None for a job without pictures, which leaves no folder.
    objects: Option<Box<dyn ObjectStore>>,
    root: String,
    job: String,
    prompts: Vec<String>,
    /// The newest generation of which each step has pictures. The lock is held while one is written: lists and files agree.
    generations: Mutex<BTreeMap<Step, Generation>>,
}

impl Gallery {
    /// A gallery for the prompts of `job` in `folder`, which is made if the job has any.
    ///
    /// # Errors
    /// Names the folder if it cannot be made.
    pub fn new(folder: &Path, job: &Job) -> anyhow::Result<Self> {
        let root = folder.display().to_string();
        let prompts = job.pictures.prompts.clone();
        let open = || -> anyhow::Result<Box<dyn ObjectStore>> {
            std::fs::create_dir_all(folder).map_err(|error| anyhow::anyhow!("cannot make {root}: {error}"))?;
            Ok(Box::new(object_store::local::LocalFileSystem::new_with_prefix(folder)?))
        };
        let objects = if prompts.is_empty() { None } else { Some(open()?) };
        Ok(Self { inner: Arc::new(Inner { objects, root, job: job.name.clone(), prompts, generations: Mutex::default() }) })
    }

    /// Writes the picture of prompt `index` by the weights of `step` and brings the step's list up to date; says where the picture lies.
    ///
    /// A step that became void is trained again, in a later generation: a picture that was drawn before and comes late must not replace
    /// the one that is of the weights.
    ///
    /// # Errors
    /// [`GalleryError`].
    pub async fn keep(&self, step: Step, generation: Generation, index: u32, png: bytes::Bytes) -> Result<String, GalleryError> {
        let Inner { objects, root, prompts, generations, .. } = &*self.inner;
        let objects = objects
            .as_deref()
            .filter(|_| (index as usize) < prompts.len())
            .ok_or(GalleryError::NoSuchPrompt { index, num_prompts: prompts.len() })?;
        if png.len() > MAX_PNG_BYTES {
            return Err(GalleryError::TooLarge { got: png.len() });
        }
        if !png.starts_with(PNG_SIGNATURE) {
            return Err(GalleryError::NotPng);
        }
        let failed = |source| GalleryError::Store { root: root.clone(), source };
        let mut generations = generations.lock().await;
        let kept = generations.entry(step).or_insert(generation);
        if *kept > generation {
            return Err(GalleryError::Older { step, kept: *kept, got: generation });
        }
        *kept = generation;
        let folder = format!("step-{:09}", step.0);
        let file = format!("{folder}/{}", self.file_name(index as usize));
        // Readers see no half a picture: the store writes beside it and renames.
        objects.put(&Key::from(file.as_str()), PutPayload::from(png)).await.map_err(failed)?;
        self.write_list(objects, step, &folder).await.map_err(failed)?;
        Ok(format!("{root}/{file}"))
    }

    fn file_name(&self, index: usize) -> String {
        let width = self.inner.prompts.len().saturating_sub(1).to_string().len().max(2);
        format!("{index:0width$}.png")
    }

    async fn write_list(&self, objects: &dyn ObjectStore, step: Step, folder: &str) -> Result<(), object_store::Error> {
        let Inner { job, prompts, root, .. } = &*self.inner;
        let found: Vec<_> = objects.list(Some(&Key::from(folder))).try_collect().await?;
        let is_there = |name: &str| found.iter().any(|object| object.location.filename() == Some(name));
        let pictures: Vec<_> = (prompts.iter().enumerate())
            .map(|(index, prompt)| (self.file_name(index), prompt))
            .filter(|(file, _)| is_there(file))
            .map(|(file, prompt)| serde_json::json!({ "file": file, "prompt": prompt }))
            .collect();
        if pictures.len() == prompts.len() {
            tracing::info!("pictures of step {step} are in {root}/{folder}");
        }
        let list = serde_json::json!({ "job": job, "step": step.0, "pictures": pictures });
        objects.put(&Key::from(format!("{folder}/{LIST}")), PutPayload::from(format!("{list:#}\n"))).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gallery(folder: &Path, prompts: &str) -> Gallery {
        let job = format!(
            "[model]\npath = \"m\"\n[student]\npath = \"s\"\n[data]\nshards = [\"0.tar\"]\n[train]\nsteps = 1\n[pictures]\nprompts = {prompts}"
        );
        Gallery::new(&folder.join("pictures"), &Job::parse(&job).unwrap()).unwrap()
    }

    fn png(content: &str) -> bytes::Bytes {
        [PNG_SIGNATURE, content.as_bytes()].concat().into()
    }

    #[tokio::test]
    async fn list_names_the_pictures_that_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let gallery = gallery(folder.path(), r#"["红", "蓝"]"#);
        let location = gallery.keep(Step(1000), Generation(1), 1, png("blue")).await.unwrap();
        assert!(location.ends_with("pictures/step-000001000/01.png"), "{location}");
        assert_eq!(std::fs::read(location).unwrap(), png("blue"));
        let list = || {
            let text = std::fs::read(folder.path().join("pictures/step-000001000/pictures.json")).unwrap();
            serde_json::from_slice::<serde_json::Value>(&text).unwrap()
        };
        assert_eq!(list()["pictures"], serde_json::json!([{ "file": "01.png", "prompt": "蓝" }]));
        gallery.keep(Step(1000), Generation(1), 0, png("red")).await.unwrap();
        assert_eq!((list()["step"].as_u64(), list()["pictures"].as_array().unwrap().len()), (Some(1000), 2));
        assert_eq!(std::fs::read_dir(folder.path().join("pictures/step-000001000")).unwrap().count(), 3, "no partial file stays behind");
    }

    #[tokio::test]
    async fn late_picture_of_a_void_step_does_not_replace_the_one_drawn_since() {
        let folder = tempfile::tempdir().unwrap();
        let gallery = gallery(folder.path(), r#"["红", "蓝"]"#);
        gallery.keep(Step(5), Generation(1), 0, png("void")).await.unwrap();
        let location = gallery.keep(Step(5), Generation(2), 0, png("of the weights")).await.unwrap();
        let late = gallery.keep(Step(5), Generation(1), 1, png("late")).await;
        assert!(matches!(late, Err(GalleryError::Older { kept: Generation(2), got: Generation(1), .. })), "{late:?}");
        assert_eq!(std::fs::read(location).unwrap(), png("of the weights"));
        gallery.keep(Step(4), Generation(1), 0, png("another step")).await.unwrap();
    }

    #[tokio::test]
    async fn what_no_honest_worker_sends_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let gallery = gallery(folder.path(), r#"["红"]"#);
        let keep = async |index, bytes| gallery.keep(Step(1), Generation(1), index, bytes).await.unwrap_err().to_string();
        assert_eq!(keep(1, png("")).await, "there is no prompt 1: pictures.prompts has 1");
        assert_eq!(keep(0, bytes::Bytes::from_static(b"GIF89a")).await, "the bytes are no PNG");
        assert!(keep(0, vec![0; MAX_PNG_BYTES + 1].into()).await.contains("at most"));
        assert!(!folder.path().join("pictures/step-000000001").exists());
    }

    #[tokio::test]
    async fn job_without_prompts_has_no_gallery() {
        let folder = tempfile::tempdir().unwrap();
        assert!(gallery(folder.path(), "[]").keep(Step(1), Generation(1), 0, png("")).await.is_err());
        assert!(!folder.path().join("pictures").exists());
    }
}
