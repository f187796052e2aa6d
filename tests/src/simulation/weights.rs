//! Trained weights, as far as exactness goes: which steps made them, out of which samples.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use peapod_proto::ids::{Generation, SampleName, Step};

/// One step in the making of some weights.
#[derive(Debug)]
pub struct Made {
    /// The step.
    pub step: Step,
    /// The generation that made it.
    pub generation: Generation,
    /// Its global batch.
    pub names: Vec<SampleName>,
    /// It was not finite: the weights stayed as they were.
    pub skipped: bool,
    digest: u64,
    before: Weights,
}

/// Weights by their whole past. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Weights(Option<Rc<Made>>);

impl Weights {
    /// These weights after one more step.
    pub fn after(&self, step: Step, generation: Generation, names: Vec<SampleName>, skipped: bool) -> Self {
        let mut hasher = DefaultHasher::new();
        (self.digest(), step, &names, skipped).hash(&mut hasher);
        Self(Some(Rc::new(Made { step, generation, names, skipped, digest: hasher.finish(), before: self.clone() })))
    }

    /// The last step.
    pub fn step(&self) -> Step {
        self.0.as_ref().map_or(Step(0), |made| made.step)
    }

    /// Equal for equal weights.
    pub fn digest(&self) -> u64 {
        self.0.as_ref().map_or(0, |made| made.digest)
    }

    /// Their steps, the newest first.
    pub fn steps(&self) -> impl Iterator<Item = &Made> {
        std::iter::successors(self.0.as_deref(), |made| made.before.0.as_deref())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // One after the other: a long past would fill the stack.
        let mut before = self.before.0.take();
        while let Some(mut made) = before.and_then(Rc::into_inner) {
            before = made.before.0.take();
        }
    }
}

/// What a rank trains.
#[derive(Debug, Clone, Default)]
pub struct TrainState {
    /// The weights.
    pub weights: Weights,
    /// The generation that trained them; none if they are fresh or from a checkpoint.
    pub generation: Generation,
}

impl TrainState {
    /// The last applied step.
    pub fn step(&self) -> Step {
        self.weights.step()
    }
}
