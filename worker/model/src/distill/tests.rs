//! The algebra of the step, on the demo's models.

use std::path::PathBuf;
use std::sync::OnceLock;

use super::*;

fn demo() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/demo/model"))
}

fn distiller(distill: DistillConfig) -> Distiller {
    distiller_of_kind(distill, Kind::Float)
}

fn distiller_of_kind(distill: DistillConfig, kind: Kind) -> Distiller {
    // Tests run beside each other, each with libtorch's threads, which would spin for the same cores.
    tch::set_num_threads(1);
    distiller_here(distill, kind)
}

/// With as many lanes as libtorch has threads here.
fn distiller_here(distill: DistillConfig, kind: Kind) -> Distiller {
    let options = LoadOptions { distill, context_length: 24, student: StudentOptions::new(kind, Device::Cpu), vae_kind: kind };
    Distiller::load(&ModelSource::open(&demo(), None).unwrap(), &demo().join("text_encoder_zh"), options).unwrap()
}

fn adapter() -> Adapter {
    let config = AdapterConfig { input: 64, hidden: 32, depth: 3, pooled: 48, output: Some(80) };
    Adapter::fresh(config, 7, Device::Cpu).unwrap()
}

/// A batch of 64 x 48 pixels whose numbers are the same in every run; sample i depends on i alone.
fn batch(native: &[bool], drop: &[bool]) -> MicroBatch {
    let count = native.len() as i64;
    let wave = |shape: &[i64], speed: f64| {
        let elements: i64 = shape.iter().product();
        (Tensor::arange(elements, (Kind::Double, Device::Cpu)) * speed).sin().reshape(shape).to_kind(Kind::Float) * 1.5
    };
    let captions = ["红色的圆形", "蓝色的方块", "小的绿色三角形", "白色背景上的大星形"];
    let english = ["a red circle", "a blue square", "a small green triangle", "a big star on a white background"];
    let take = |texts: &[&str]| (0..native.len()).map(|index| texts[index % texts.len()].to_owned()).collect();
    MicroBatch {
        images: Images::Pixels(((wave(&[count, 3, 64, 48], 0.37) / 1.5 + 1.0) * 127.0).to_kind(Kind::Uint8)),
        posterior: wave(&[count, 4, 8, 6], 1.7),
        noise: wave(&[count, 4, 8, 6], 2.3),
        offset: wave(&[count, 4], 3.1),
        timesteps: (Tensor::arange(count, (Kind::Int64, Device::Cpu)) * 251 + 17).remainder(1000),
        drop: Tensor::from_slice(drop),
        native: Tensor::from_slice(native),
        prompts: Prompts::Captions(take(&captions)),
        english: English::Captions(take(&english)),
        original_size: (0..count).map(|index| (200 + index, 150 - index)).collect(),
        crop: (0..count).map(|index| (index, 2 * index)).collect(),
        text_dropout: (0..count as u64).collect(),
    }
}

/// Gives each sample another one's texts.
fn reverse(batch: &mut MicroBatch) {
    if let (Prompts::Captions(captions), English::Captions(english)) = (&mut batch.prompts, &mut batch.english) {
        captions.reverse();
        english.reverse();
    }
}

fn pixels(batch: &MicroBatch) -> &Tensor {
    let Images::Pixels(pixels) = &batch.images else { panic!("no pixels") };
    pixels
}

fn accumulate(distiller: &Distiller, batch: &MicroBatch) -> (LossSums, Tensor) {
    let adapter = adapter();
    let mut gradient = Tensor::zeros([adapter.num_parameters() as i64], (Kind::Float, Device::Cpu));
    (distiller.accumulate(&adapter, batch, &mut gradient).unwrap(), gradient)
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.norm().double_value(&[])
}

fn relative_distance(got: &Tensor, wanted: &Tensor) -> f64 {
    norm(&(got - wanted)) / norm(wanted)
}

/// What the encoders say of a batch, made beforehand.
fn encoded(distiller: &Distiller, mut batch: MicroBatch) -> MicroBatch {
    let _guard = no_grad_guard();
    batch.images = Images::Moments(encode_pixels(distiller.vae(), pixels(&batch), false).unwrap());
    let (Prompts::Captions(captions), English::Captions(english)) = (&batch.prompts, &batch.english) else { panic!("no captions") };
    let (sequence, mask) = (distiller.student().encode(captions).unwrap(), distiller.student().token_mask(captions).unwrap());
    batch.english = English::States(distiller.teacher().unwrap().encode(english).unwrap());
    batch.prompts = Prompts::States { sequence, mask };
    batch
}

/// Gives each sample the rows of another one.
fn swap(tensors: &mut [&mut Tensor]) {
    tensors.iter_mut().for_each(|tensor| **tensor = tensor.flip([0]));
}

fn moments(batch: &mut MicroBatch) -> &mut Tensor {
    let Images::Moments(moments) = &mut batch.images else { panic!("no moments") };
    &mut moments.mean
}

fn prompts(batch: &mut MicroBatch) -> &mut Tensor {
    let Prompts::States { sequence, .. } = &mut batch.prompts else { panic!("no states") };
    sequence
}

fn english(batch: &mut MicroBatch) -> [&mut Tensor; 2] {
    let English::States(Conditioning { sequence, pooled: Some(pooled), .. }) = &mut batch.english else { panic!("no states") };
    [sequence, pooled]
}

/// Also with dropped prompts and native samples, of which the teacher hears nothing.
#[test]
fn what_is_encoded_ahead_teaches_what_its_step_would_encode() {
    for hybrid in [true, false] {
        let distiller = distiller(DistillConfig { hybrid, mask_pads: true, ..DistillConfig::default() });
        let make = || batch(&[false, true, true, false, false], &[false, false, true, true, false]);
        let (sums, gradient) = accumulate(&distiller, &make());
        let mut ahead = make();
        distiller.encode_ahead(&mut ahead).unwrap();
        assert!(matches!((&ahead.images, &ahead.prompts), (Images::Moments(_), Prompts::States { .. })));
        let English::States(states) = &ahead.english else { panic!("no states") };
        let is_zero = |row: i64| norm(&states.sequence.get(row)) == 0.0;
        assert_eq!((0..5).map(is_zero).collect::<Vec<_>>(), [false, hybrid, hybrid, false, false]);
        assert_eq!(ahead.tensors().len(), 12);
        // What is encoded stays as it is.
        let mean = moments(&mut ahead).shallow_clone();
        distiller.encode_ahead(&mut ahead).unwrap();
        assert_eq!(moments(&mut ahead).data_ptr(), mean.data_ptr());
        let (encoded, same) = accumulate(&distiller, &ahead);
        assert!((encoded.task - sums.task).abs() < 1e-5 * sums.task && (encoded.feature - sums.feature).abs() < 1e-5 * sums.feature);
        assert!(relative_distance(&same, &gradient) < 1e-5);
    }
}

/// Dropout differs from step to step, and is not for the shelf.
#[test]
fn captions_of_an_encoder_that_drops_are_left_to_the_step() {
    let student = StudentOptions { dropout: true, ..StudentOptions::new(Kind::Float, Device::Cpu) };
    let options = LoadOptions { distill: DistillConfig::default(), context_length: 24, student, vae_kind: Kind::Float };
    let models = Distiller::load(&ModelSource::open(&demo(), None).unwrap(), &demo().join("text_encoder_zh"), options).unwrap();
    assert!(models.student().drops());
    let mut batch = batch(&[false], &[false]);
    models.encode_ahead(&mut batch).unwrap();
    assert!(matches!((&batch.images, &batch.prompts), (Images::Moments(_), Prompts::Captions(_))));
}

#[test]
fn states_and_moments_that_do_not_fit_are_refused() {
    with_default(|distiller| {
        let refused = |change: &dyn Fn(&mut MicroBatch), part: &str| {
            let mut faulty = encoded(distiller, batch(&[false, true], &[false, false]));
            change(&mut faulty);
            let error = distiller.evaluate(&adapter(), &faulty).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        };
        let shorter = |tensor: &mut Tensor| *tensor = tensor.narrow(1, 0, 3);
        refused(&|batch| shorter(moments(batch)), "moments [2, 3, 8, 6]");
        refused(&|batch| shorter(prompts(batch)), "with a mask");
        refused(&|batch| *prompts(batch) = prompts(batch).narrow(2, 0, 5), "states of the student [2, 24, 5]");
        refused(&|batch| shorter(english(batch)[0]), "states of the teacher");
        refused(&|batch| shorter(english(batch)[1]), "pooled text of the teacher [2, 3]");
        refused(&|batch| *english(batch)[0] = english(batch)[0].narrow(0, 0, 1), "1 entries of english for 2 samples");
    });
}

#[test]
fn what_was_encoded_before_gives_the_same_losses_and_gradient() {
    for mask_pads in [false, true] {
        let distiller = distiller(DistillConfig { mask_pads, ..DistillConfig::default() });
        let batch = || batch(&[false, true, false], &[false, false, true]);
        let (sums, gradient) = accumulate(&distiller, &batch());
        let (cached_sums, cached_gradient) = accumulate(&distiller, &encoded(&distiller, batch()));
        // The same kernels on the same numbers; the teacher's texts were encoded three at a time instead of two.
        assert!(
            (sums.task - cached_sums.task).abs() < 1e-6 * sums.task && (sums.feature - cached_sums.feature).abs() < 1e-5 * sums.feature
        );
        let distance = relative_distance(&cached_gradient, &gradient);
        assert!(distance < 1e-5, "{distance}");
        // Each of the parts counts.
        let changed = |change: &dyn Fn(&mut MicroBatch)| {
            let mut batch = encoded(&distiller, batch());
            change(&mut batch);
            relative_distance(&accumulate(&distiller, &batch).1, &gradient)
        };
        for (part, distance) in [
            ("posterior", changed(&|batch| batch.posterior = -&batch.posterior)),
            ("crop", changed(&|batch| batch.crop = vec![(9, 9); 3])),
            ("images", changed(&|batch| swap(&mut [moments(batch)]))),
            ("prompts", changed(&|batch| swap(&mut [prompts(batch)]))),
            ("english", changed(&|batch| swap(&mut english(batch)))),
        ] {
            assert!(distance > 1e-4, "another {part}: {distance}");
        }
    }
}

/// Networks of fewer bits give the gradient of those in f32 up to their rounding: bf16 keeps 8 bits of a number, f16 11.
#[test]
fn gradients_in_few_bits_are_those_in_many_to_rounding() {
    let batch = batch(&[true, false, false], &[false, false, true]);
    let (wanted, exact) = with_default(|distiller| accumulate(distiller, &batch));
    for (kind, scale, tolerance) in [(Kind::BFloat16, 1.0, 0.1), (Kind::Half, 1024.0, 0.02)] {
        for gradient_checkpointing in [false, true] {
            let options = LoadOptions {
                distill: DistillConfig { gradient_checkpointing, ..DistillConfig::default() },
                context_length: 24,
                student: StudentOptions::new(kind, Device::Cpu),
                vae_kind: Kind::Float,
            };
            let distiller = Distiller::load(&ModelSource::open(&demo(), None).unwrap(), &demo().join("text_encoder_zh"), options).unwrap();
            let (adapter, mut gradient) = (adapter(), exact.zeros_like());
            let sums = distiller.accumulate_scaled(&adapter, &batch, &mut gradient, scale).unwrap();
            let distance = relative_distance(&gradient, &exact);
            assert!(distance < tolerance && distance > 1e-6, "{kind:?}: {distance}");
            assert!((sums.task / wanted.task - 1.0).abs() < tolerance && (sums.logit / wanted.logit - 1.0).abs() < 2.0 * tolerance);
        }
    }
}

/// Eight bits in the transformers: not the same gradient, and near it; whichever way it is computed.
#[test]
fn linears_in_eight_bits_keep_the_direction_of_the_gradient() {
    let batch = batch(&[true, false, false, false], &[false, false, true, false]);
    let (wanted, exact) = with_default(|distiller| accumulate(distiller, &batch));
    let config = DistillConfig { fp8_linears: true, ..DistillConfig::default() };
    let (sums, gradient) = accumulate(&distiller(config.clone()), &batch);
    let distance = relative_distance(&gradient, &exact);
    assert!(distance > 1e-3 && distance < 0.3, "{distance}");
    for (got, wanted) in [(sums.task, wanted.task), (sums.logit, wanted.logit), (sums.feature, wanted.feature)] {
        assert!((got / wanted - 1.0).abs() < 0.05, "{sums:?} {wanted:?}");
    }
    // A number just between two codes falls to one of them by its last bit, which other kernels have otherwise.
    let again = accumulate(&distiller(DistillConfig { gradient_checkpointing: true, ..config }), &batch).1;
    assert!(relative_distance(&again, &gradient) < distance / 2.0, "{} of {distance}", relative_distance(&again, &gradient));
}

/// A scale beyond the range of f16 is not hidden: the step is to be skipped and the scale to be halved.
#[test]
fn overflow_in_f16_reaches_the_gradient_and_not_the_losses() {
    let distiller = distiller_of_kind(DistillConfig::default(), Kind::Half);
    let (adapter, batch) = (adapter(), batch(&[true], &[false]));
    let mut gradient = Tensor::zeros([adapter.num_parameters() as i64], (Kind::Float, Device::Cpu));
    let sums = distiller.accumulate_scaled(&adapter, &batch, &mut gradient, 1e12).unwrap();
    assert!(!norm(&gradient).is_finite() && sums.task.is_finite());
}

/// The demo's models with the default configuration, loaded once for all tests.
fn with_default<T>(test: impl FnOnce(&Distiller) -> T) -> T {
    static SHARED: OnceLock<Distiller> = OnceLock::new();
    tch::set_num_threads(1);
    test(SHARED.get_or_init(|| distiller(DistillConfig::default())))
}

/// That the teacher runs on a subset, and that gradients are sums, show in the same comparison: a mixed batch equals its samples alone.
#[test]
fn a_mixed_batch_is_the_sum_of_its_samples() {
    with_default(|distiller| {
        let batch = batch(&[false, true, false, true], &[false, false, true, true]);
        let (sums, gradient) = accumulate(distiller, &batch);
        let mut expected_sums = LossSums::default();
        let mut expected = gradient.zeros_like();
        for index in 0..batch.len() {
            let (part, part_gradient) = accumulate(distiller, &batch.single(index));
            expected_sums += part;
            expected += part_gradient;
        }
        assert_eq!(sums.count, 4);
        for (got, wanted) in [(sums.task, expected_sums.task), (sums.logit, expected_sums.logit), (sums.feature, expected_sums.feature)] {
            assert!(wanted > 0.0 && (got - wanted).abs() < 1e-4 * wanted, "{sums:?} {expected_sums:?}");
        }
        // Other batch sizes take other kernels: equal to rounding only.
        assert!(relative_distance(&gradient, &expected) < 1e-3, "{}", relative_distance(&gradient, &expected));
    });
}

/// Three lanes for five samples, of which some are native, dropped, or both: what one thread gives, to rounding.
#[test]
fn lanes_give_what_one_thread_gives() {
    let batch = batch(&[false, true, false, true, false], &[false, false, true, true, false]);
    with_default(|alone| {
        let (wanted_sums, wanted) = accumulate(alone, &batch);
        let wanted_evaluation = alone.evaluate(&adapter(), &batch).unwrap();
        for gradient_checkpointing in [false, true] {
            tch::set_num_threads(3);
            let lanes = distiller_here(DistillConfig { gradient_checkpointing, ..DistillConfig::default() }, Kind::Float);
            assert_eq!(lanes.lanes.as_ref().map(Lanes::num), Some(3));
            let (sums, gradient) = accumulate(&lanes, &batch);
            assert_eq!(tch::get_num_threads(), 3, "as it was");
            assert!(relative_distance(&gradient, &wanted) < 1e-3, "{}", relative_distance(&gradient, &wanted));
            let evaluation = lanes.evaluate(&adapter(), &batch).unwrap();
            for (got, wanted) in [(sums, wanted_sums), (evaluation, wanted_evaluation)] {
                let pairs = [(got.task, wanted.task), (got.logit, wanted.logit), (got.feature, wanted.feature)];
                assert_eq!(got.count, 5);
                assert!(pairs.iter().all(|(got, wanted)| (got - wanted).abs() < 1e-4 * wanted), "{got:?} {wanted:?}");
            }
            // Fewer samples than lanes: none of them is idle, as libtorch shares the operators out.
            assert_eq!(accumulate(&lanes, &batch.split(5)[0]).0.count, 1);
            // What does not fit is refused before it is cut up.
            let mut faulty = batch.split(1).remove(0);
            faulty.crop.pop();
            assert!(matches!(lanes.evaluate(&adapter(), &faulty), Err(Error::Shape { .. })));
            tch::set_num_threads(1);
        }
    });
}

#[test]
fn batches_are_dealt_into_parts_as_equal_as_can_be() {
    let batch = batch(&[false; 7], &[false; 7]);
    let sizes = |num| batch.split(num).iter().map(MicroBatch::len).collect::<Vec<_>>();
    assert_eq!([sizes(1), sizes(3), sizes(7)], [vec![7], vec![3, 2, 2], vec![1; 7]]);
    assert_eq!((sizes(9), sizes(0)), (vec![1; 7], vec![7]));
    let parts = batch.split(3);
    assert_eq!(parts[1].original_size, [batch.original_size[1], batch.original_size[4]]);
    assert_eq!(parts[2].timesteps, batch.timesteps.index_select(0, &Tensor::from_slice(&[2_i64, 5])));
}

/// Parallel samples before native ones, as batches are put together, and any other order: the same sums.
#[test]
fn the_order_of_samples_changes_nothing() {
    with_default(|distiller| {
        let mixed = batch(&[true, false, true, false, false], &[false, false, true, true, false]);
        let mut sorted = batch(&[false, false, false, true, true], &[false, true, false, false, true]);
        let order = [1_usize, 3, 4, 0, 2];
        let rows = |tensor: &Tensor| tensor.index_select(0, &Tensor::from_slice(&order.map(|index| index as i64)));
        sorted.images = Images::Pixels(rows(pixels(&mixed)));
        for (to, from) in [
            (&mut sorted.posterior, &mixed.posterior),
            (&mut sorted.noise, &mixed.noise),
            (&mut sorted.offset, &mixed.offset),
            (&mut sorted.timesteps, &mixed.timesteps),
        ] {
            *to = rows(from);
        }
        let (Prompts::Captions(prompts), English::Captions(english)) = (&mixed.prompts, &mixed.english) else { panic!("no captions") };
        sorted.prompts = Prompts::Captions(order.map(|index| prompts[index].clone()).into());
        sorted.english = English::Captions(order.map(|index| english[index].clone()).into());
        sorted.original_size = order.map(|index| mixed.original_size[index]).into();
        sorted.crop = order.map(|index| mixed.crop[index]).into();
        let ((sums, gradient), (wanted_sums, wanted)) = (accumulate(distiller, &sorted), accumulate(distiller, &mixed));
        assert!(relative_distance(&gradient, &wanted) < 1e-3, "{}", relative_distance(&gradient, &wanted));
        for (got, wanted) in [(sums.task, wanted_sums.task), (sums.logit, wanted_sums.logit), (sums.feature, wanted_sums.feature)] {
            assert!(wanted > 0.0 && (got - wanted).abs() < 1e-4 * wanted, "{sums:?} {wanted_sums:?}");
        }
    });
}

/// Rows that the teacher computes for nothing say nothing, whether its batch is made of captions or of states.
#[test]
fn a_teacher_on_more_rows_teaches_the_same() {
    let mut filled = distiller(DistillConfig::default());
    filled.fills_quarters = true;
    let flags = ([false, false, false, true, true, true, true, true], [false, true, true, false, false, false, true, false]);
    with_default(|distiller| {
        for batch in [batch(&flags.0, &flags.1), encoded(distiller, batch(&flags.0, &flags.1))] {
            let ((sums, gradient), (wanted_sums, wanted)) = (accumulate(&filled, &batch), accumulate(distiller, &batch));
            assert!(relative_distance(&gradient, &wanted) < 1e-3, "{}", relative_distance(&gradient, &wanted));
            for (got, wanted) in [(sums.task, wanted_sums.task), (sums.logit, wanted_sums.logit), (sums.feature, wanted_sums.feature)] {
                assert!(wanted > 0.0 && (got - wanted).abs() < 1e-4 * wanted, "{sums:?} {wanted_sums:?}");
            }
        }
    });
}

#[test]
fn a_teachers_batch_has_few_sizes() {
    let sizes = |micro_batch: usize| (1..=micro_batch).map(|count| fill(count, micro_batch)).collect::<Vec<_>>();
    assert_eq!(sizes(8), [2, 2, 4, 4, 6, 6, 8, 8]);
    assert_eq!(sizes(10), [3, 3, 3, 6, 6, 6, 9, 9, 9, 10]);
    assert_eq!((sizes(1), sizes(3)), (vec![1], vec![1, 2, 3]));
    let rows = Tensor::arange(6, (Kind::Float, Device::Cpu)).reshape([2, 3]);
    let repeated = repeat_last(&rows, 4).unwrap();
    assert_eq!((repeated.size(), repeated.narrow(0, 0, 2)), (vec![4, 3], rows.shallow_clone()));
    assert_eq!(repeated.narrow(0, 3, 1), rows.narrow(0, 1, 1));
    assert_eq!(repeat_last(&rows, 2).unwrap().data_ptr(), rows.data_ptr());
}

#[test]
fn native_samples_have_no_distillation_loss_and_do_not_read_english() {
    with_default(|distiller| {
        let mut batch = batch(&[true, true], &[false, true]);
        let (sums, gradient) = accumulate(distiller, &batch);
        assert!(sums.task > 0.0 && sums.logit == 0.0 && sums.feature == 0.0, "{sums:?}");
        batch.english = English::Captions(vec![String::new(), "another text".into()]);
        let (_, other) = accumulate(distiller, &batch);
        assert_eq!(norm(&(gradient - other)), 0.0);
    });
}

#[test]
fn parallel_samples_have_no_task_loss() {
    with_default(|distiller| {
        let (sums, _) = accumulate(distiller, &batch(&[false, false], &[false, false]));
        assert!(sums.task == 0.0 && sums.logit > 0.0 && sums.feature > 0.0, "{sums:?}");
    });
}

#[test]
fn a_dropped_batch_learns_through_pooled_text_and_through_the_empty_prompt() {
    with_default(|distiller| {
        let dropped = batch(&[true, true], &[true, true]);
        let (_, gradient) = accumulate(distiller, &dropped);
        // The final linear (the last two parameters) makes token states only, so its gradient came through the empty prompt.
        let length: i64 = adapter().parameters().iter().rev().take(2).map(|parameter| parameter.numel() as i64).sum();
        assert!(norm(&gradient.narrow(0, gradient.size()[0] - length, length)) > 0.0);
        // The captions reach a dropped sample as pooled text only: other captions, another gradient.
        let mut other = batch(&[true, true], &[true, true]);
        reverse(&mut other);
        let (_, other_gradient) = accumulate(distiller, &other);
        assert!(relative_distance(&other_gradient, &gradient) > 1e-6);
    });
}

#[test]
fn gradients_add_up_and_an_empty_batch_adds_nothing() {
    with_default(|distiller| {
        let (adapter, batch) = (adapter(), batch(&[true], &[false]));
        let (sums, once) = accumulate(distiller, &batch);
        let mut twice = once.copy();
        distiller.accumulate(&adapter, &batch, &mut twice).unwrap();
        assert!(relative_distance(&twice, &(&once * 2.0)) < 1e-5);
        assert_eq!(distiller.evaluate(&adapter, &batch).unwrap(), sums);

        let mut nothing = batch.single(0);
        for tensor in [&mut nothing.posterior, &mut nothing.noise] {
            *tensor = tensor.narrow(0, 0, 0);
        }
        nothing.original_size.clear();
        let before = once.copy();
        let mut gradient = once;
        assert_eq!(distiller.accumulate(&adapter, &nothing, &mut gradient).unwrap(), LossSums::default());
        assert_eq!(norm(&(gradient - before)), 0.0);
    });
}

#[test]
fn switches_change_which_samples_count() {
    let mixed = || batch(&[false, true], &[false, false]);
    let (plain, _) = accumulate(&distiller(DistillConfig { distill: false, ..DistillConfig::default() }), &mixed());
    assert!(plain.task > 0.0 && plain.logit == 0.0 && plain.feature == 0.0, "{plain:?}");
    let (all, _) = accumulate(&distiller(DistillConfig { hybrid: false, ..DistillConfig::default() }), &mixed());
    let (hybrid, _) = with_default(|distiller| accumulate(distiller, &mixed()));
    // Without hybrid training the task loss is over both samples, as without a teacher, and the native sample has a teacher too.
    assert!((all.task - plain.task).abs() < 1e-5 * plain.task && all.task > hybrid.task, "{all:?} {plain:?} {hybrid:?}");
    assert!(all.logit > hybrid.logit && all.feature > hybrid.feature, "{all:?} {hybrid:?}");

    // With `drop_pooled`, captions cannot reach a dropped sample at all.
    let fully_dropped = distiller(DistillConfig { drop_pooled: true, ..DistillConfig::default() });
    let mut dropped = batch(&[false, false], &[true, true]);
    let (sums, _) = accumulate(&fully_dropped, &dropped);
    reverse(&mut dropped);
    assert_eq!(accumulate(&fully_dropped, &dropped).0, sums);
}

#[test]
fn bf16_models_give_about_the_same_step() {
    let batch = batch(&[false, true], &[false, true]);
    let (sums, gradient) = with_default(|distiller| accumulate(distiller, &batch));
    let (rough_sums, rough_gradient) = accumulate(&distiller_of_kind(DistillConfig::default(), Kind::BFloat16), &batch);
    // bf16 has 8 significant bits; the losses are differences of rounded values.
    for (rough, exact) in [(rough_sums.task, sums.task), (rough_sums.logit, sums.logit), (rough_sums.feature, sums.feature)] {
        assert!((rough - exact).abs() < 0.1 * exact, "{rough_sums:?} {sums:?}");
    }
    assert_eq!(rough_gradient.kind(), Kind::Float);
    assert!(relative_distance(&rough_gradient, &gradient) < 0.3, "{}", relative_distance(&rough_gradient, &gradient));
}

/// The kernels are those of GPUs, on an emulator.
#[test]
fn fused_operators_give_the_same_step_and_are_used_everywhere() {
    let batch = batch(&[false, true, false], &[false, false, true]);
    let (sums, gradient) = with_default(|distiller| accumulate(distiller, &batch));
    let fused = peapod_kernels::emulator::with(|| distiller(DistillConfig::default()));
    let before = peapod_kernels::emulator::num_launches();
    let (fused_sums, fused_gradient) = accumulate(&fused, &batch);
    assert!((fused_sums.logit / sums.logit - 1.0).abs() < 1e-4 && (fused_sums.feature / sums.feature - 1.0).abs() < 1e-4);
    assert!(relative_distance(&fused_gradient, &gradient) < 1e-3, "{}", relative_distance(&fused_gradient, &gradient));
    // Both passes of the network, the autoencoder, the text encoders, the losses, and a way back: a layer that falls back to libtorch is
    // missing here.
    assert_eq!(peapod_kernels::emulator::num_launches() - before, 542, "a layer computes otherwise than before");

    // The same with eight bits in the transformers, whose inputs and gradients are rounded by a kernel of their own.
    let config = DistillConfig { fp8_linears: true, ..DistillConfig::default() };
    let (_, gradient) = accumulate(&distiller(config.clone()), &batch);
    let fused = peapod_kernels::emulator::with(|| distiller(config));
    let before = peapod_kernels::emulator::num_launches();
    let (_, fused_gradient) = accumulate(&fused, &batch);
    assert!(relative_distance(&fused_gradient, &gradient) < 0.05, "{}", relative_distance(&fused_gradient, &gradient));
    // Three passes through six products in each of 17 layers.
    assert_eq!(peapod_kernels::emulator::num_launches() - before, 542 + 3 * 6 * 17, "a layer computes otherwise than before");
}

#[test]
fn time_ids_put_height_or_width_first() {
    let batch = batch(&[true], &[false]);
    let ids = |order| Vec::<f32>::try_from(batch.time_ids(order, 8, Device::Cpu).unwrap().flatten(0, 1)).unwrap();
    assert_eq!(ids(TimeIdsOrder::Hw), [150.0, 200.0, 0.0, 0.0, 64.0, 48.0]);
    assert_eq!(ids(TimeIdsOrder::Wh), [200.0, 150.0, 0.0, 0.0, 48.0, 64.0]);
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    with_default(|distiller| {
        let adapter = adapter();
        let num_parameters = adapter.num_parameters() as i64;
        let mut gradient = Tensor::zeros([num_parameters], (Kind::Float, Device::Cpu));
        let mut refused = |change: &dyn Fn(&mut MicroBatch), part: &str| {
            let mut faulty = batch(&[false, true], &[false, false]);
            change(&mut faulty);
            let error = distiller.accumulate(&adapter, &faulty, &mut gradient).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        };
        refused(&|batch| batch.timesteps = Tensor::from_slice(&[3i64, 1000]), "timestep 1000");
        refused(&|batch| batch.images = Images::Pixels(pixels(batch).narrow(2, 0, 60)), "multiples of 8");
        refused(&|batch| batch.noise = batch.noise.narrow(2, 0, 7), "noise");
        refused(&|batch| batch.drop = batch.drop.to_kind(Kind::Int64), "drop");
        refused(&|batch| batch.english = English::Captions(vec!["one".into()]), "english");
        let mut short = Tensor::zeros([num_parameters - 1], (Kind::Float, Device::Cpu));
        assert!(distiller.accumulate(&adapter, &batch(&[true], &[false]), &mut short).is_err());
        let narrow = Adapter::fresh(AdapterConfig { input: 63, ..*adapter.config() }, 7, Device::Cpu).unwrap();
        let error = distiller.evaluate(&narrow, &batch(&[true], &[false])).unwrap_err();
        assert!(error.to_string().contains("63"), "{error}");
    });
}

/// Units are computed again from what lies between them: the same operations, so the same numbers to the last few bits.
#[test]
fn recomputed_activations_give_the_same_losses_and_gradient() {
    for (native_only, drop_pooled) in [(false, false), (false, true), (true, false)] {
        let mut batch = self::batch(&[false, true, false], &[false, false, true]);
        if native_only {
            batch.native = Tensor::from_slice(&[true, true, true]);
        }
        let config = DistillConfig { drop_pooled, ..DistillConfig::default() };
        let (sums, gradient) = accumulate(&distiller(config.clone()), &batch);
        let (again, gradient_again) = accumulate(&distiller(DistillConfig { gradient_checkpointing: true, ..config }), &batch);
        assert_eq!(again, sums);
        let distance = relative_distance(&gradient_again, &gradient);
        assert!(distance < 1e-5, "{distance}");
    }
}

#[test]
fn min_snr_weighs_the_losses_on_predictions_alone() {
    let gamma = 5.0;
    let weighted = distiller(DistillConfig { min_snr_gamma: gamma, ..DistillConfig::default() });
    let schedule = NoiseSchedule::new(&weighted.scheduler().noise);
    // One parallel and one native sample, each at a timestep of a ratio above the bound, then below it.
    for (timestep, native) in [(20i64, false), (20, true), (900, false), (900, true)] {
        let mut one = batch(&[native], &[false]);
        one.timesteps = Tensor::from_slice(&[timestep]);
        let (plain, _) = with_default(|distiller| accumulate(distiller, &one));
        let (sums, _) = accumulate(&weighted, &one);
        let alpha_bar = schedule.alphas_cumprod()[timestep as usize];
        let ratio = alpha_bar / (1.0 - alpha_bar);
        let weight = ratio.min(gamma) / ratio;
        assert!(if timestep == 20 { weight < 0.1 } else { weight == 1.0 });
        for (got, unweighted) in [(sums.task, plain.task), (sums.logit, plain.logit)] {
            assert!((got - weight * unweighted).abs() <= 1e-5 * unweighted, "{got} of {unweighted} at {timestep}");
        }
        assert_eq!(sums.feature, plain.feature);
    }
}

#[test]
fn features_that_are_not_finite_are_left_out_on_request() {
    let features = |value: f64| {
        vec![Tensor::full([1, 1, 1, 1], value, (Kind::Float, Device::Cpu)), Tensor::ones([1, 2, 1, 1], (Kind::Float, Device::Cpu))]
    };
    let lesson = |guard| Lesson {
        kernels: None,
        target: Tensor::zeros([0, 1, 1, 1], (Kind::Float, Device::Cpu)),
        untaught: Subset::none(),
        taught: Subset::all(1),
        teacher: Some(UNetOutput { sample: Tensor::zeros([1, 1, 1, 1], (Kind::Float, Device::Cpu)), features: features(0.0) }),
        weights: None,
        kind: Kind::Half,
        guard,
    };
    // 300^2 is beyond half precision.
    for (value, guard, wanted) in [(300.0, true, 0.0), (300.0, false, f64::INFINITY), (2.0, true, 4.0), (2.0, false, 4.0)] {
        let output = UNetOutput { sample: Tensor::ones([1, 1, 1, 1], (Kind::Float, Device::Cpu)), features: features(value) };
        let sums = lesson(guard).compare(&output).unwrap().pending(1).unwrap().read().unwrap();
        assert_eq!((sums.feature, sums.logit), (wanted, 1.0), "{value} {guard}");
    }
}
