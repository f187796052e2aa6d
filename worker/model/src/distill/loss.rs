//! The three losses.

use peapod_kernels::Kernels;
use tch::{Kind, Tensor, no_grad_guard};

use super::Subset;
use crate::Result;
use crate::unet::UNetOutput;

/// The losses of a micro-batch, each summed over the samples it applies to; scalars in f32.
pub(super) struct Losses {
    pub task: Tensor,
    pub logit: Tensor,
    pub feature: Tensor,
}

/// Sums of the losses over samples. Divided by the number of samples of a whole step, they are the losses of the method.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// Number of samples, also those that a loss does not apply to.
    pub count: usize,
    /// Squared error of the prediction, averaged over elements.
    pub task: f64,
    /// Squared difference of the student's from the teacher's prediction, averaged over elements.
    pub logit: f64,
    /// Squared differences of the features, each averaged over its elements, summed over the features; not weighted.
    pub feature: f64,
}

/// Sums of losses that a GPU may still be computing: whoever reads them waits for it.
#[derive(Debug, Default)]
pub struct PendingSums(Vec<(usize, Tensor)>);

impl PendingSums {
    /// Adds more of them.
    pub fn append(&mut self, mut more: Self) {
        self.0.append(&mut more.0);
    }

    /// Waits for all of them, and brings them to the host.
    ///
    /// Errors: [`crate::Error::Torch`].
    pub fn read(self) -> Result<LossSums> {
        let mut sums = LossSums::default();
        for (count, values) in self.0 {
            let values = Vec::<f64>::try_from(values)?;
            sums += LossSums { count, task: values[0], logit: values[1], feature: values[2] };
        }
        Ok(sums)
    }
}

impl std::ops::AddAssign for LossSums {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.task += other.task;
        self.logit += other.logit;
        self.feature += other.feature;
    }
}

impl Losses {
    /// The loss that is differentiated.
    pub fn total(&self, feature_weight: f64) -> Tensor {
        &self.task + &self.logit + &self.feature * feature_weight
    }

    /// The values, without what they were computed from.
    pub fn pending(&self, count: usize) -> Result<PendingSums> {
        let values = Tensor::f_stack(&[&self.task, &self.logit, &self.feature], 0)?.detach().to_kind(Kind::Double);
        Ok(PendingSums(vec![(count, values)]))
    }
}

/// What a student's output is compared with, and how.
pub(super) struct Lesson {
    /// What the task loss wants, on the untaught samples `[U, C, h, w]`.
    pub target: Tensor,
    /// Samples that learn from their image.
    pub untaught: Subset,
    /// Samples that learn from the teacher.
    pub taught: Subset,
    /// The teacher's output on them, unless there are none.
    pub teacher: Option<UNetOutput>,
    /// Weight of each sample's predictions `[B]`; `None`: all alike.
    pub weights: Option<Tensor>,
    /// The kind differences are taken in.
    pub kind: Kind,
    /// Leaves features out that are not finite.
    pub guard: bool,
    /// Fused operators for the kind of the outputs.
    pub kernels: Option<Kernels>,
}

impl Lesson {
    /// The losses of a student's output on the whole batch.
    pub fn compare(&self, output: &UNetOutput) -> Result<Losses> {
        let zero = || Tensor::zeros([], (Kind::Float, output.sample.device()));
        let weights_of = |subset: &Subset| self.weights.as_ref().map(|weights| subset.select(weights));
        let task = match self.untaught.is_empty() {
            true => zero(),
            false => {
                let errors = self.mean_squares(&self.untaught.select(&output.sample), &self.target);
                weighted_sum(errors, weights_of(&self.untaught))
            }
        };
        let Some(teacher) = &self.teacher else { return Ok(Losses { task, logit: zero(), feature: zero() }) };
        let errors = self.mean_squares(&self.taught.select(&output.sample), &teacher.sample);
        let logit = weighted_sum(errors, weights_of(&self.taught));
        let mut feature = zero();
        for (student, teacher) in output.features.iter().zip(&teacher.features) {
            let student = self.taught.select(student);
            if self.guard && !differs_finitely(&student, teacher, self.kind)? {
                continue;
            }
            feature += self.mean_squares(&student, teacher).sum(Kind::Float);
        }
        Ok(Losses { task, logit, feature })
    }

    /// Mean over channel and space of the squared difference; the mean in f32 whatever the kinds. `right` learns nothing.
    ///
    /// Shapes: both `[N, C, h, w]`; returns `[N]`.
    fn mean_squares(&self, left: &Tensor, right: &Tensor) -> Tensor {
        let fused = self.kernels.as_ref().filter(|_| self.kind == Kind::Float).and_then(|kernels| kernels.mean_squares(left, right));
        fused.unwrap_or_else(|| squares(left, right, self.kind).mean_dim(&[1i64, 2, 3][..], false, Kind::Float))
    }
}

/// The squared difference, taken in `kind`.
fn squares(left: &Tensor, right: &Tensor, kind: Kind) -> Tensor {
    (left.to_kind(kind) - right.to_kind(kind)).square()
}

fn weighted_sum(errors: Tensor, weights: Option<Tensor>) -> Tensor {
    weights.map_or_else(|| errors.shallow_clone(), |weights| &errors * weights).sum(Kind::Float)
}

fn differs_finitely(left: &Tensor, right: &Tensor, kind: Kind) -> Result<bool> {
    let _guard = no_grad_guard();
    Ok(squares(left, right, kind).isfinite().all().f_int64_value(&[])? != 0)
}
