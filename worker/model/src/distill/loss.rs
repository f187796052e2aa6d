//! The three losses.

use tch::{Kind, Tensor};

use crate::Result;

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
    /// Squared error of the predicted noise, averaged over elements.
    pub task: f64,
    /// Squared difference of the student's from the teacher's prediction, averaged over elements.
    pub logit: f64,
    /// Squared differences of the features, each averaged over its elements, summed over the features; not weighted.
    pub feature: f64,
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

    /// Brings the values to the host, in one copy.
    pub fn sums(&self, count: usize) -> Result<LossSums> {
        let values = Tensor::f_stack(&[&self.task, &self.logit, &self.feature], 0)?.detach().to_kind(Kind::Double);
        let values = Vec::<f64>::try_from(values)?;
        Ok(LossSums { count, task: values[0], logit: values[1], feature: values[2] })
    }
}

/// Mean over channel and space of the squared difference, summed over the samples; in f32 whatever the kinds.
///
/// Shapes: both `[B, C, h, w]`; returns a scalar.
pub(super) fn sum_of_mean_squares(left: &Tensor, right: &Tensor) -> Tensor {
    let elements_per_sample: i64 = left.size().iter().skip(1).product();
    (left.to_kind(Kind::Float) - right.to_kind(Kind::Float)).square().sum(Kind::Float) / elements_per_sample as f64
}
