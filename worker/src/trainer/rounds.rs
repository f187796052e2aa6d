//! What a job does between two steps now and then: losses on its validation samples, and pictures of its prompts.
//!
//! Both are due after the same steps on every member, which each finds out for itself, and the members share the work by their index. They
//! come before the all-reduce of the step that follows: its tail carries the sums of the losses, so that no collective is added that a
//! death could leave half of the members in. A new generation that starts from such a step does the work again, as its members may be
//! others.
//!
//! Step 0 counts: later losses are compared with those of the fresh weights, and what cannot work shows before hours of training.
//!
//! The weights that are looked at are those people sample with: the moving average where the job keeps one, else the trained ones.

use std::ops::ControlFlow;
use std::sync::mpsc::Sender;

use peapod_data::{LoaderConfig, ValidationSet};
use peapod_model::adapter::Adapter;
use peapod_model::distill::{Distiller, LossSums};
use peapod_model::sample::{MAX_SIDE, SampleOptions};
use peapod_proto::PROGRAM_VERSION;
use peapod_proto::ids::{Generation, MemberIndex, Step};
use peapod_proto::job::{Job, PicturesSection};
use peapod_proto::message::{Assignment, ValidationLosses};
use sha2::{Digest, Sha256};

use super::Unloaded;
use super::tensors::to_tensors;
use crate::picture::Picture;
use crate::tail::{LossTotals, ValidationTotals};

/// The rounds of a job.
pub struct Rounds {
    validation: Option<Validation>,
    pictures: Option<Pictures>,
}

struct Validation {
    set: ValidationSet,
    every: u64,
}

struct Pictures {
    job: String,
    prompts: Vec<String>,
    options: SampleOptions,
    every: u64,
}

/// What is to be done after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Due {
    /// Losses on the validation samples.
    pub validation: bool,
    /// Pictures.
    pub pictures: bool,
}

impl Due {
    /// How many of the two.
    pub fn count(self) -> u32 {
        u32::from(self.validation) + u32::from(self.pictures)
    }

    /// What of it `done` is not.
    pub fn without(self, done: Self) -> Self {
        Self { validation: self.validation && !done.validation, pictures: self.pictures && !done.pictures }
    }
}

/// A picture on its way to the coordinator.
pub struct Drawn {
    /// The generation it was drawn in.
    pub generation: Generation,
    /// The step whose weights drew it.
    pub step: Step,
    /// Place of its prompt in the job.
    pub index: u32,
    /// The file.
    pub png: Vec<u8>,
    /// Dropped with it, once it is sent or given up: who holds the other end sees that.
    pub sent: Sender<()>,
}

/// Why a round ended early.
pub enum Unfinished {
    /// The caller broke off.
    BrokenOff,
    /// The model could not do it.
    Failed(peapod_model::Error),
}

impl From<peapod_model::Error> for Unfinished {
    fn from(error: peapod_model::Error) -> Self {
        Self::Failed(error)
    }
}

impl Rounds {
    /// Reads the validation samples of a job and checks that its pictures can be drawn.
    ///
    /// # Errors
    /// Names the shard or the field of the job file.
    pub fn load(job: &Job, models: &Distiller, data: &LoaderConfig) -> Result<Self, Unloaded> {
        let section = &job.validation;
        let load = || ValidationSet::load(&section.shards, section.samples, data, |warning| tracing::warn!("{warning}"));
        let unread = |error: peapod_data::Error| Unloaded {
            // A store that is down now may be back when the worker is.
            permanent: !matches!(error, peapod_data::Error::Store(_)),
            message: format!("validation.shards: {error}"),
        };
        let set = if section.shards.is_empty() { None } else { Some(load().map_err(unread)?) };
        let pictures = (!job.pictures.prompts.is_empty()).then(|| Pictures::check(job, models)).transpose()?;
        if let Some(set) = &set {
            tracing::info!("{} validation samples", set.len());
        }
        Ok(Self { validation: set.map(|set| Validation { set, every: section.every_steps }), pictures })
    }

    /// What is due after `step`: a function of nothing else.
    pub fn due(&self, step: Step) -> Due {
        let is_due = |every: u64| step.0.is_multiple_of(every);
        Due {
            validation: self.validation.as_ref().is_some_and(|validation| is_due(validation.every)),
            pictures: self.pictures.as_ref().is_some_and(|pictures| is_due(pictures.every)),
        }
    }

    /// What is due after the last step of all.
    pub fn due_at_the_end(&self) -> Due {
        Due { validation: self.validation.is_some(), pictures: self.pictures.is_some() }
    }

    /// A digest of the models and of which validation samples there are, which all ranks must have alike.
    pub fn digest_with(&self, models: Vec<u8>) -> Vec<u8> {
        let Some(validation) = &self.validation else { return models };
        let mut hasher = Sha256::new_with_prefix(models);
        for (name, key, num_bytes) in validation.set.inventory() {
            hasher.update(format!("{name} {num_bytes} {key}\n"));
        }
        hasher.finalize().to_vec()
    }

    /// This member's part of the losses of `adapter`. `go_on` is asked before each micro-batch.
    pub fn validate(
        &self,
        models: &Distiller,
        adapter: &Adapter,
        assignment: &Assignment,
        go_on: impl Fn() -> bool,
    ) -> Result<ValidationTotals, Unfinished> {
        let Some(validation) = &self.validation else { return Ok(ValidationTotals::default()) };
        let mut sums = LossSums::default();
        let part = validation.set.part(assignment.member_index.0, assignment.num_members, |warning| tracing::warn!("{warning}"));
        for batch in part {
            if !go_on() {
                return Err(Unfinished::BrokenOff);
            }
            for batch in to_tensors(&batch, models.vae().downscale())? {
                sums += models.evaluate(adapter, &batch)?;
            }
        }
        let losses = LossTotals { task: sums.task as f32, logit: sums.logit as f32, feature: sums.feature as f32 };
        Ok(ValidationTotals { samples: sums.count as u32, losses })
    }

    /// Draws this member's prompts with `adapter` and hands each picture to `keep`. `go_on` is asked after each step of the sampler.
    pub fn draw(
        &self,
        models: &Distiller,
        adapter: &Adapter,
        step: Step,
        assignment: &Assignment,
        go_on: impl Fn() -> bool,
        mut keep: impl FnMut(u32, Vec<u8>),
    ) -> Result<(), Unfinished> {
        let Some(pictures) = &self.pictures else { return Ok(()) };
        let prompter = models.prompter(adapter);
        for (index, prompt) in pictures.part(assignment.member_index, assignment.num_members) {
            // The noise belongs to the place in the list, so that a prompt begins with the same each time, whoever draws it.
            let options = SampleOptions { first_image: index.into(), ..pictures.options.clone() };
            let on_step = |_| if go_on() { ControlFlow::Continue(()) } else { ControlFlow::Break(Unfinished::BrokenOff) };
            match models.sampler().try_draw(prompter, &[prompt], &options, on_step)? {
                ControlFlow::Continue(drawn) => keep(index, pictures.encode(&drawn, prompt, step)?),
                ControlFlow::Break(unfinished) => return Err(unfinished),
            }
        }
        Ok(())
    }
}

impl Pictures {
    fn check(job: &Job, models: &Distiller) -> Result<Self, String> {
        let PicturesSection { prompts, every_steps, size, steps, guidance, seed } = job.pictures.clone();
        let [width, height] = size.map_or_else(|| [models.native_side(); 2], |size| size.map(i64::from));
        // Each level of the UNet but the last halves what the autoencoder has reduced already.
        let multiple = models.vae().downscale() << models.unet().config().block_out_channels.len().saturating_sub(1).min(30);
        if [width, height].iter().any(|side| side % multiple != 0 || !(multiple..=MAX_SIDE).contains(side)) {
            return Err(format!(
                "pictures.size: this model cannot draw {width} x {height} pixels; both must be multiples of {multiple} within {multiple}..={MAX_SIDE}"
            ));
        }
        let options = SampleOptions { width, height, num_steps: steps as usize, guidance, seed, batch_size: 1, ..SampleOptions::default() };
        models.sampler().scheduler.plan(options.solver, options.num_steps).map_err(|error| format!("pictures.steps: {error}"))?;
        Ok(Self { job: job.name.clone(), prompts, options, every: every_steps })
    }

    /// A member's prompts with their places: every `i` with `i mod num_members = member`.
    fn part(&self, member: MemberIndex, num_members: u32) -> impl Iterator<Item = (u32, &str)> {
        (0..).zip(self.prompts.iter().map(String::as_str)).filter(move |(index, _)| index % num_members == member.0)
    }

    fn encode(&self, drawn: &tch::Tensor, prompt: &str, step: Step) -> peapod_model::Result<Vec<u8>> {
        let mut rgb = vec![0u8; drawn.numel()];
        drawn.f_copy_data_u8(&mut rgb, drawn.numel())?;
        let SampleOptions { width, height, seed, num_steps, guidance, .. } = &self.options;
        let (step, seed) = (step.to_string(), seed.to_string());
        let settings = format!("{num_steps} steps, guidance {guidance}");
        let software = format!("peapod worker {PROGRAM_VERSION}");
        let texts =
            [("prompt", prompt), ("job", &self.job), ("step", &step), ("seed", &seed), ("settings", &settings), ("Software", &software)];
        let picture = Picture::new(*width as u32, *height as u32, rgb);
        let png = picture.map_err(|error| error.to_string()).and_then(|picture| picture.to_png(&texts).map_err(|error| error.to_string()));
        png.map_err(|detail| peapod_model::Error::Shape { what: "picture", detail })
    }
}

/// The means of a validation of `step`'s weights; nothing where none was due.
pub fn means(step: Step, totals: &ValidationTotals) -> Option<ValidationLosses> {
    let ValidationTotals { samples, losses: LossTotals { task, logit, feature } } = *totals;
    let count = samples as f32;
    (samples > 0).then(|| ValidationLosses { step, samples, task: task / count, logit: logit / count, feature: feature / count })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Device;

    use super::*;
    use crate::setup;

    /// The demo with its first shard for validation and four prompts.
    fn job() -> Job {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = std::fs::read_to_string(root.join("tests/demo/job.toml")).unwrap();
        let text = text.replace("\"tests/demo", &format!("\"{}/tests/demo", root.display()));
        let shard = root.join("tests/demo/shards/00000.tar");
        let rounds = format!(
            "[validation]\nshards = [\"{}\"]\nsamples = 6\nevery_steps = 3\n[pictures]\nprompts = [\"红\", \"蓝\", \"绿\", \"黄\"]\nevery_steps = 4\nsteps = 2\nsize = [64, 32]",
            shard.display()
        );
        Job::parse(&format!("{text}\n{rounds}")).unwrap()
    }

    fn models() -> Distiller {
        setup::load_models(&job(), Device::Cpu).unwrap()
    }

    fn assignment(member: u32, num_members: u32) -> Assignment {
        Assignment {
            generation: Generation(1),
            member_index: MemberIndex(member),
            num_members,
            bootstrap: vec![],
            base_step: Step(0),
            base_generation: Generation::NONE,
            source_index: MemberIndex(0),
            broadcast_state: false,
            checkpoint_step: None,
            held_leases: vec![],
            global_batch: 16,
        }
    }

    fn load(job: &Job, models: &Distiller) -> Result<Rounds, String> {
        Rounds::load(job, models, &setup::loader_config(job, models).unwrap()).map_err(|unloaded| {
            assert!(unloaded.permanent, "another worker reads the same: {}", unloaded.message);
            unloaded.message
        })
    }

    #[test]
    fn members_together_do_what_one_would_do_alone() {
        let (job, models) = (job(), models());
        let rounds = load(&job, &models).unwrap();
        let adapter = Adapter::fresh(setup::adapter_config(&job, &models), 1, Device::Cpu).unwrap();
        let validate =
            |member, num_members| rounds.validate(&models, &adapter, &assignment(member, num_members), || true).ok().expect("a validation");
        let (alone, parts) = (validate(0, 1), [0, 1, 2, 3].map(|member| validate(member, 4)));
        assert_eq!(alone.samples, 6);
        assert_eq!(parts.map(|part| part.samples), [2, 2, 1, 1]);
        let feature: f32 = parts.iter().map(|part| part.losses.feature).sum();
        assert!((feature / alone.losses.feature - 1.0).abs() < 1e-5, "{feature} in parts, {} alone", alone.losses.feature);
        assert_eq!(validate(0, 1), alone, "each time the same");
        assert!(matches!(rounds.validate(&models, &adapter, &assignment(0, 1), || false), Err(Unfinished::BrokenOff)));

        let draw = |member, num_members| {
            let mut drawn = Vec::new();
            let result =
                rounds.draw(&models, &adapter, Step(8), &assignment(member, num_members), || true, |index, png| drawn.push((index, png)));
            assert!(result.is_ok());
            drawn
        };
        let alone = draw(0, 1);
        let mut shared: Vec<_> = (0..3).flat_map(|member| draw(member, 3)).collect();
        shared.sort();
        assert_eq!(shared.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(shared == alone, "a picture is the same whoever draws it");
        let broken_off = rounds.draw(&models, &adapter, Step(8), &assignment(0, 1), || false, |_, _| panic!("a picture"));
        assert!(matches!(broken_off, Err(Unfinished::BrokenOff)));

        let reader = png::Decoder::new(std::io::Cursor::new(&alone[1].1)).read_info().unwrap();
        assert_eq!((reader.info().width, reader.info().height), (64, 32));
        let text = |keyword: &str| {
            let mut texts = reader.info().utf8_text.iter();
            texts.find(|chunk| chunk.keyword == keyword).map(|chunk| chunk.get_text().unwrap())
        };
        assert_eq!([text("prompt"), text("step"), text("job")], ["蓝", "8", "demo"].map(|text| Some(text.to_owned())));
    }

    #[test]
    fn what_is_due_is_a_function_of_the_step() {
        let (job, models) = (job(), models());
        let rounds = load(&job, &models).unwrap();
        let due = |step| {
            let Due { validation, pictures } = rounds.due(Step(step));
            (validation, pictures)
        };
        assert_eq!([0, 1, 3, 4, 12].map(due), [(true, true), (false, false), (true, false), (false, true), (true, true)]);
        let at_the_end = rounds.due_at_the_end();
        assert_eq!(at_the_end.without(rounds.due(Step(3))), Due { validation: false, pictures: true }, "what was done is not done again");
        assert_eq!((at_the_end.count(), at_the_end.without(at_the_end).count()), (2, 0));

        let digest = rounds.digest_with(vec![1]);
        let fewer = Job { validation: peapod_proto::job::ValidationSection { samples: 5, ..job.validation.clone() }, ..job.clone() };
        assert_ne!(load(&fewer, &models).unwrap().digest_with(vec![1]), digest);
        let none = Job { validation: Default::default(), pictures: Default::default(), ..job.clone() };
        let none = load(&none, &models).unwrap();
        assert_eq!((none.digest_with(vec![1]), none.due(Step(0)).count(), none.due_at_the_end().count()), (vec![1], 0, 0));
    }

    #[test]
    fn what_cannot_be_drawn_or_read_is_said_at_load_time() {
        let (job, models) = (job(), models());
        let with = |size, steps| Job { pictures: PicturesSection { size, steps, ..job.pictures.clone() }, ..job.clone() };
        let error = load(&with(Some([72, 64]), 2), &models).err().unwrap();
        assert_eq!(error, "pictures.size: this model cannot draw 72 x 64 pixels; both must be multiples of 32 within 32..=8192");
        let native = load(&with(None, 2), &models).unwrap();
        let SampleOptions { width, height, .. } = native.pictures.unwrap().options;
        assert_eq!((width, height), (64, 64));
        let nowhere = peapod_proto::job::ValidationSection { shards: vec!["/no/such.tar".into()], ..job.validation.clone() };
        let error = load(&Job { validation: nowhere, ..job.clone() }, &models).err().unwrap();
        assert!(error.starts_with("validation.shards: open /no/such.tar: "), "{error}");
    }

    #[test]
    fn mean_of_no_samples_is_nothing() {
        let losses = LossTotals { task: 1.0, logit: 2.0, feature: 3.0 };
        let means = |samples| means(Step(4), &ValidationTotals { samples, losses });
        assert_eq!(means(0), None);
        assert_eq!(means(2), Some(ValidationLosses { step: Step(4), samples: 2, task: 0.5, logit: 1.0, feature: 1.5 }));
    }
}
