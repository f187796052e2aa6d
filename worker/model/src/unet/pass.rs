//! One walk through the network, with or without a memory for a backward pass that computes the inside of units again.

use tch::{Tensor, no_grad_guard};

use super::blocks::{Condition, Unit};
use crate::Result;

/// A tensor between units, with a number by which gradients find it.
struct Value {
    number: usize,
    tensor: Tensor,
}

impl Value {
    fn share(&self) -> Self {
        Self { number: self.number, tensor: self.tensor.shallow_clone() }
    }

    /// As a leaf whose gradient can be asked for. The first value depends on nothing that learns.
    fn leaf(&self) -> Tensor {
        self.tensor.detach().set_requires_grad(self.number != 0)
    }
}

/// A unit that was computed, and what it was given.
struct Done<'a> {
    unit: Unit<'a>,
    input: Value,
    skip: Option<Value>,
    output: usize,
}

/// The state between two units.
pub(crate) struct Pass<'a> {
    condition: Condition<'a>,
    hidden: Value,
    skips: Vec<Value>,
    features: Vec<Value>,
    /// What was done, if that is remembered.
    tape: Option<Vec<Done<'a>>>,
}

impl<'a> Pass<'a> {
    /// Starts from the output of the first convolution, which is also the first skip connection.
    pub fn new(condition: Condition<'a>, first: Tensor) -> Self {
        let hidden = Value { number: 0, tensor: first };
        Self { condition, skips: vec![hidden.share()], hidden, features: Vec::new(), tape: None }
    }

    /// The same with a memory of all units.
    pub fn remembering(condition: Condition<'a>, first: Tensor) -> Self {
        Self { tape: Some(Vec::new()), ..Self::new(condition, first) }
    }

    /// Computes a unit of what the last one gave.
    pub(super) fn apply(&mut self, unit: Unit<'a>) {
        self.compute(unit, None);
    }

    /// Computes a unit of what the last one gave, joined with the newest skip connection.
    pub(super) fn apply_joined(&mut self, unit: Unit<'a>) {
        let skip = self.skips.pop();
        self.compute(unit, skip);
    }

    fn compute(&mut self, unit: Unit<'a>, skip: Option<Value>) {
        let tensor = unit.forward(&self.hidden.tensor, skip.as_ref().map(|skip| &skip.tensor), self.condition);
        let output = Value { number: self.hidden.number + 1, tensor };
        let input = std::mem::replace(&mut self.hidden, output);
        if let Some(tape) = &mut self.tape {
            tape.push(Done { unit, input, skip, output: self.hidden.number });
        }
    }

    /// Keeps what the last unit gave as a skip connection.
    pub(super) fn keep_skip(&mut self) {
        self.skips.push(self.hidden.share());
    }

    /// Keeps what the last unit gave as a feature.
    pub fn keep_feature(&mut self) {
        self.features.push(self.hidden.share());
    }

    /// The size to enlarge to: that of the next skip connection, which with an odd size is not twice the half.
    pub(super) fn size_above(&self) -> [i64; 2] {
        let (_, _, height, width) = self.hidden.tensor.size4().unwrap_or_default();
        self.skips.last().and_then(|skip| skip.tensor.size4().ok()).map_or([2 * height, 2 * width], |(_, _, height, width)| [height, width])
    }

    /// Adds to what the last unit gave. Not remembered: nothing that learns may be added.
    pub fn add(&mut self, residual: &Tensor) {
        self.hidden.tensor = &self.hidden.tensor + residual;
    }

    /// Adds to the skip connections, oldest first. Not remembered either.
    pub fn add_to_skips(&mut self, residuals: &[Tensor]) {
        for (skip, residual) in self.skips.iter_mut().zip(residuals) {
            skip.tensor = &skip.tensor + residual;
        }
    }

    /// The skip connections that nothing has consumed, oldest first.
    pub fn skips(&self) -> impl ExactSizeIterator<Item = &Tensor> {
        self.skips.iter().map(|skip| &skip.tensor)
    }

    /// What the last unit gave.
    pub fn hidden(&self) -> &Tensor {
        &self.hidden.tensor
    }

    /// What was kept as features, in order.
    pub fn features(&self) -> Vec<Tensor> {
        self.features.iter().map(|feature| feature.tensor.shallow_clone()).collect()
    }
}

/// Gradients of what every unit is conditioned on.
pub(super) struct ConditionGradients {
    /// `[B, T]`; `None` if nothing depends on it.
    pub time: Option<Tensor>,
    /// `[B, L, D]`; `None` likewise.
    pub text: Option<Tensor>,
}

/// Walks back through the units of a remembered pass, computing each again.
///
/// `output` and `features` are the gradients of what the last unit gave and of the features; undefined tensors are zeros.
/// Errors: [`crate::Error::Torch`].
pub(super) fn walk_back(pass: Pass<'_>, output: Tensor, features: Vec<Tensor>) -> Result<ConditionGradients> {
    let Pass { condition, hidden, features: kept, tape, .. } = pass;
    let mut gradients: Vec<Option<Tensor>> = (0..=hidden.number).map(|_| None).collect();
    let mut given = |value: &Value, gradient: Tensor| add(&mut gradients[value.number], gradient);
    given(&hidden, output);
    kept.iter().zip(features).for_each(|(feature, gradient)| given(feature, gradient));
    drop((hidden, kept));

    let (time, text) = (condition.time.detach().set_requires_grad(true), condition.text.detach().set_requires_grad(true));
    let condition = Condition { time: &time, text: &text, ..condition };
    let (mut time_gradient, mut text_gradient) = (None, None);
    // Popped one by one: what a unit was given is freed as soon as it has been walked over.
    let mut tape = tape.unwrap_or_default();
    while let Some(Done { unit, input, skip, output }) = tape.pop() {
        let Some(gradient) = gradients[output].take() else { continue };
        let (input_leaf, skip_leaf) = (input.leaf(), skip.as_ref().map(Value::leaf));
        let again = unit.forward(&input_leaf, skip_leaf.as_ref(), condition);
        let learning = [Some((&input, &input_leaf)), skip.as_ref().zip(skip_leaf.as_ref())].into_iter().flatten();
        let learning: Vec<(&Value, &Tensor)> = learning.filter(|(_, leaf)| leaf.requires_grad()).collect();
        let leaves: Vec<&Tensor> = [&time, &text].into_iter().chain(learning.iter().map(|&(_, leaf)| leaf)).collect();
        let mut found = vector_jacobian(&again, &gradient, &leaves)?.into_iter();
        for sum in [&mut time_gradient, &mut text_gradient] {
            add(sum, found.next().unwrap_or_default());
        }
        for ((value, _), gradient) in learning.into_iter().zip(found) {
            add(&mut gradients[value.number], gradient);
        }
    }
    Ok(ConditionGradients { time: time_gradient, text: text_gradient })
}

/// Adds a gradient to what has been gathered; an undefined one says that nothing depends on the value.
fn add(sum: &mut Option<Tensor>, gradient: Tensor) {
    if gradient.defined() {
        let _guard = no_grad_guard();
        *sum = Some(match sum.take() {
            Some(sum) => sum + gradient,
            None => gradient,
        });
    }
}

/// The gradients of `leaves` when that of `output` is `gradient`; undefined where `output` does not depend on a leaf.
pub(crate) fn vector_jacobian(output: &Tensor, gradient: &Tensor, leaves: &[&Tensor]) -> Result<Vec<Tensor>> {
    if !output.requires_grad() {
        return Ok(leaves.iter().map(|_| Tensor::new()).collect());
    }
    // libtorch's interface starts from scalars only: the gradient of this sum with respect to `output` is `gradient`.
    let scalar = (output * gradient).sum(output.kind());
    Ok(Tensor::f_run_backward(&[&scalar], leaves, false, false)?)
}
