//! What the proof at the start does not look at: which inputs are taken, and numbers that are out of the ordinary.

use tch::{Device, Kind, Tensor, no_grad};

use crate::emulator::{self, kernels};
use crate::{GroupNorm, Kernels, LayerNorm};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn map(size: [i64; 4]) -> Tensor {
    let [batch, channels, height, width] = size;
    let numbers = Tensor::arange(batch * channels * height * width, CPU) * 0.37;
    numbers.sin().reshape([batch, height, width, channels]).permute([0, 3, 1, 2])
}

/// Group norm without scale and shift, of 4 groups.
fn norm(kernels: &Kernels, input: &Tensor, added: Option<&Tensor>) -> Option<Tensor> {
    let channels = input.size()[1];
    let [weight, bias] = [Tensor::ones([channels], CPU), Tensor::zeros([channels], CPU)].map(|tensor| tensor.to_kind(kernels.kind()));
    GroupNorm { weight: &weight, bias: &bias, groups: 4, eps: 1e-5, silu: false }.forward(kernels, input, added)
}

fn largest_difference(left: &Tensor, right: &Tensor) -> f64 {
    (left - right).abs().max().double_value(&[])
}

#[test]
fn maps_that_lie_otherwise_are_left_to_libtorch() {
    let kernels = kernels(Kind::Float);
    let taken = |input: &Tensor| norm(&kernels, input, None).is_some();
    assert!(taken(&map([2, 16, 3, 5])));
    assert!(taken(&map([2, 16, 3, 5]).select(3, 0).unsqueeze(3).contiguous_channels_last()));
    assert!(!taken(&map([2, 16, 3, 5]).contiguous()), "channels first");
    assert!(!taken(&map([2, 16, 3, 5]).narrow(2, 1, 2)), "a part of a map");
    assert!(!taken(&map([2, 16, 3, 5]).to_kind(Kind::BFloat16)), "another kind");
    assert!(!taken(&map([2, 14, 3, 5])), "no whole packs");
    assert!(taken(&map([1, 2560, 1, 1])) && !taken(&map([1, 2564, 1, 1])), "more channels than a block has threads for");
    assert!(!taken(&map([2, 16, 3, 5]).narrow(0, 0, 0)), "nothing");
    assert!(!taken(&Tensor::zeros([4, 16], CPU)), "no map");
    // Four bytes behind where a pack may begin.
    let shifted = Tensor::zeros([2 * 15 * 16 + 1], CPU).narrow(0, 1, 2 * 15 * 16).view([2, 3, 5, 16]).permute([0, 3, 1, 2]);
    assert!(!taken(&shifted));
}

/// A kernel reads as far as it is told: what is too short for it must not reach it.
#[test]
fn weights_and_sums_of_other_sizes_are_left_to_libtorch() {
    let (kernels, input) = (kernels(Kind::Float), map([2, 16, 3, 5]));
    let ones = |size: &[i64]| Tensor::ones(size, CPU);
    let taken = |weight: &[i64], bias: &[i64], added: Option<&[i64]>, groups| {
        let (weight, bias, added) = (ones(weight), ones(bias), added.map(ones));
        let norm = GroupNorm { weight: &weight, bias: &bias, groups, eps: 1e-5, silu: true };
        norm.forward(&kernels, &input, added.as_ref()).is_some()
    };
    assert!(taken(&[16], &[16], Some(&[2, 16]), 4));
    assert!(!taken(&[12], &[16], None, 4) && !taken(&[16], &[12], None, 4));
    assert!(!taken(&[16], &[16], Some(&[1, 16]), 4) && !taken(&[16], &[16], Some(&[2, 12]), 4));
    assert!(!taken(&[16], &[16], None, 3), "no whole groups");
    let (states, weight, short) = (ones(&[3, 16]), ones(&[16]), ones(&[12]));
    let taken = |weight: &Tensor, bias: &Tensor| LayerNorm { weight, bias, eps: 1e-5 }.forward(&kernels, &states, &states).is_some();
    assert!(taken(&weight, &weight) && !taken(&short, &weight) && !taken(&weight, &short));
}

trait ChannelsLast {
    fn contiguous_channels_last(&self) -> Tensor;
}

impl ChannelsLast for Tensor {
    fn contiguous_channels_last(&self) -> Tensor {
        self.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
    }
}

#[test]
fn states_that_do_not_fit_are_left_to_libtorch() {
    let kernels = kernels(Kind::Half);
    let states = |width: i64| Tensor::ones([2, 3, width], (Kind::Half, Device::Cpu));
    assert_eq!(kernels.geglu(&states(32)).map(|made| made.size()), Some(vec![2, 3, 16]));
    assert!(kernels.geglu(&states(24)).is_none(), "halves of no whole packs");
    assert!(kernels.geglu(&states(33)).is_none(), "no halves");
    assert!(kernels.geglu(&states(32).transpose(1, 2)).is_none(), "columns");
    assert!(kernels.geglu(&states(32).to_kind(Kind::Float)).is_none());
    assert!(kernels.geglu(&states(32).narrow(1, 0, 0)).is_none());

    let (weight, bias) = (states(16).select(0, 0).select(0, 0), states(16).select(0, 0).select(0, 0));
    let layer = LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 };
    assert!(layer.forward(&kernels, &states(16), &states(16)).is_some());
    assert!(layer.forward(&kernels, &states(32), &states(32)).is_none(), "of another width than the weights");
    assert!(layer.forward(&kernels, &states(16), &states(16).narrow(1, 0, 1)).is_none(), "of two sizes");
    assert!(layer.forward(&kernels, &states(16), &states(16).to_kind(Kind::Float)).is_none());
}

/// Sums of squares of numbers around a thousand have no digit left for deviations of a hundredth.
#[test]
fn deviations_beside_a_large_mean_keep_their_digits() {
    let kernels = kernels(Kind::Float);
    let input = map([2, 16, 8, 8]) * 0.01 + 1000.0;
    let exact = input.to_kind(Kind::Double).group_norm(4, None::<&Tensor>, None::<&Tensor>, 1e-5, false).to_kind(Kind::Float);
    let made = norm(&kernels, &input, None).unwrap();
    assert!(largest_difference(&made, &exact) < 1e-2, "{}", largest_difference(&made, &exact));
}

#[test]
fn groups_that_are_alike_everywhere_become_nothing_and_no_nan() {
    let kernels = kernels(Kind::Float);
    let input = (map([2, 16, 3, 4]) * 0.0 + 3.5).set_requires_grad(true);
    let made = norm(&kernels, &input, None).unwrap();
    assert_eq!(largest_difference(&made, &made.zeros_like()), 0.0);
    made.sum(Kind::Float).backward();
    assert_eq!(input.grad().isfinite().all().int64_value(&[]), 1);
}

/// A sample that is not finite shows it, and spoils no other.
#[test]
fn nan_and_infinity_come_out_where_they_went_in() {
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        for value in [f64::NAN, f64::INFINITY] {
            let kernels = kernels(kind);
            let input = map([2, 16, 3, 4]).to_kind(kind);
            let _ = input.select(0, 1).select(0, 5).select(0, 2).select(0, 1).fill_(value);
            let made = norm(&kernels, &input, None).unwrap();
            let finite = |made: &Tensor| made.isfinite().all().int64_value(&[]) == 1;
            assert!(finite(&made.select(0, 0)) && !finite(&made.select(0, 1)), "{kind:?} {value}");
            // The groups beside the one it is in are those of another sample, so to speak.
            assert!(finite(&made.select(0, 1).narrow(0, 0, 4)) && finite(&made.select(0, 1).narrow(0, 8, 8)), "{kind:?} {value}");

            let states = Tensor::ones([3, 32], (kind, Device::Cpu));
            let _ = states.select(0, 1).select(0, 20).fill_(value);
            let gated = kernels.geglu(&states).unwrap();
            assert_eq!(gated.isfinite().logical_not().sum(Kind::Int64).int64_value(&[]), 1, "{kind:?} {value}");
            let (weight, bias) = (states.select(0, 0).contiguous(), states.select(0, 2).contiguous());
            let (sum, normed) = LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 }.forward(&kernels, &states, &states).unwrap();
            assert!(!finite(&sum.select(0, 1)) && !finite(&normed.select(0, 1)), "{kind:?} {value}");
            assert!(finite(&normed.select(0, 0)) && finite(&normed.select(0, 2)), "{kind:?} {value}");
        }
    }
}

#[test]
fn differences_are_taken_of_tensors_that_lie_alike() {
    let kernels = kernels(Kind::Float);
    let (left, right) = (map([3, 16, 2, 5]), map([3, 16, 2, 5]) * 0.5);
    let wanted = (&left - &right).square().mean_dim(&[1_i64, 2, 3][..], false, Kind::Float);
    for (left, right) in [(left.shallow_clone(), right.shallow_clone()), (left.contiguous(), right.contiguous())] {
        assert!(largest_difference(&kernels.mean_squares(&left, &right).unwrap(), &wanted) < 1e-6);
    }
    assert!(kernels.mean_squares(&left, &right.contiguous()).is_none(), "in another order");
    assert!(kernels.mean_squares(&left, &right.narrow(0, 0, 1).expand([3, 16, 2, 5], false)).is_none(), "one sample seen thrice");
    assert!(kernels.mean_squares(&left.narrow(1, 0, 8), &right.narrow(1, 0, 8)).is_none(), "with gaps");
    assert!(kernels.mean_squares(&left, &right.to_kind(Kind::Half)).is_none());
    assert!(kernels.mean_squares(&left.narrow(0, 0, 0), &right.narrow(0, 0, 0)).is_none());
    let odd = || Tensor::ones([2, 3, 1, 1], CPU);
    assert!(kernels.mean_squares(&odd(), &odd()).is_none(), "no whole packs");
    // Only the left one learns.
    let (left, right) = (left.set_requires_grad(true), right.set_requires_grad(true));
    kernels.mean_squares(&left, &right).unwrap().sum(Kind::Float).backward();
    assert!(left.grad().defined() && !right.grad().defined());
}

#[test]
fn sums_are_taken_of_maps_that_lie_alike() {
    let kernels = kernels(Kind::Float);
    let (input, residual, bias) = (map([2, 16, 3, 5]), map([2, 16, 3, 5]) * 0.5, Tensor::arange(16, CPU));
    let made = kernels.add_residual(&input, &residual, &bias).unwrap();
    assert!(largest_difference(&made, &(&input + &residual + bias.reshape([16, 1, 1]))) < 1e-5);
    assert_eq!(made.stride(), input.stride());
    assert!(kernels.add_residual(&input, &residual.contiguous(), &bias).is_none(), "in another order");
    assert!(kernels.add_residual(&input, &residual.narrow(0, 0, 1), &bias).is_none(), "of two sizes");
    assert!(kernels.add_residual(&input, &residual, &bias.narrow(0, 0, 12)).is_none(), "no bias for some");
    assert!(kernels.add_residual(&input, &residual.to_kind(Kind::Half), &bias).is_none());
    assert!(kernels.add_residual(&map([2, 14, 3, 5]), &map([2, 14, 3, 5]), &Tensor::arange(14, CPU)).is_none(), "no whole packs");
    let input = input.set_requires_grad(true);
    let made = kernels.add_residual(&input, &residual, &bias).unwrap();
    (made * 2.0).sum(Kind::Float).backward();
    assert!(largest_difference(&input.grad(), &(input.ones_like() * 2.0)) == 0.0 && !residual.grad().defined());
}

#[test]
fn gradients_that_are_not_asked_for_are_not_there_and_odd_ones_are_taken() {
    let kernels = kernels(Kind::Float);
    let (input, added) = (map([2, 16, 3, 4]), Tensor::ones([2, 16], CPU).set_requires_grad(true));
    let made = norm(&kernels, &input, Some(&added)).unwrap();
    // The gradient of a sum is one number seen from everywhere.
    made.sum(Kind::Float).backward();
    assert!(added.grad().defined() && !input.grad().defined());
    let input = map([2, 16, 3, 4]).set_requires_grad(true);
    assert!(!no_grad(|| norm(&kernels, &input, None)).unwrap().requires_grad());

    // Of the two outputs of a layer norm one may be of no use.
    let states = || Tensor::arange(32, CPU).reshape([2, 16]).sin().set_requires_grad(true);
    let (weight, bias) = (Tensor::ones([16], CPU), Tensor::zeros([16], CPU));
    let layer = LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 };
    let gradients = |of: fn((Tensor, Tensor)) -> Tensor| {
        let (input, residual) = (states(), states().detach());
        let made = of(layer.forward(&kernels, &input, &residual).unwrap());
        (made * Tensor::arange(16, CPU)).sum(Kind::Float).backward();
        assert!(!residual.grad().defined());
        input.grad()
    };
    let ramp = Tensor::arange(16, CPU).expand([2, 16], false);
    assert_eq!(gradients(|(sum, _)| sum), ramp);
    let both = gradients(|(sum, normed)| sum + normed);
    let normed = gradients(|(_, normed)| normed);
    assert!(largest_difference(&both, &(normed + ramp)) < 1e-5);
}

#[test]
fn networks_get_emulated_kernels_only_where_they_are_asked_for() {
    let of = |kind| crate::of(Device::Cpu, kind).is_some();
    assert!(!of(Kind::Float));
    assert_eq!(emulator::with(|| [Kind::Float, Kind::BFloat16, Kind::Double].map(of)), [true, true, false]);
    assert!(!of(Kind::Float));
}
