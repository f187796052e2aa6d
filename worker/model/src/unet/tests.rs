use super::*;
use crate::Error;

/// The shaping settings of stable-diffusion-xl-base-1.0.
const SDXL: &str = r#"{
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10], "upcast_attention": null,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true
}"#;

/// Reads a configuration with some settings changed.
fn read(text: &str, changes: &[(&str, &str)]) -> Result<UNetConfig> {
    let mut settings: serde_json::Value = serde_json::from_str(text).unwrap();
    for (name, value) in changes {
        settings[name] = serde_json::from_str(value).unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), settings.to_string()).unwrap();
    UNetConfig::read(file.path())
}

fn count(text: &str, changes: &[(&str, &str)]) -> i64 {
    UNet::count_parameters(&read(text, changes).unwrap()).unwrap()
}

#[test]
fn parameter_totals_of_the_published_networks() {
    assert_eq!(count(SDXL, &[]), 2_567_463_684);
    // Inpainting: five more input channels of a 3x3 convolution to 320.
    assert_eq!(count(SDXL, &[("in_channels", "9")]), 2_567_463_684 + 5 * 320 * 9);
    // SD1.5 is the default of diffusers but for the text width.
    assert_eq!(count("{}", &[("cross_attention_dim", "768")]), 859_520_964);
    let ssd_1b = [
        ("transformer_layers_per_block", "[0, [2, 2], [4, 4]]"),
        ("reverse_transformer_layers_per_block", "[[4, 4, 10], [2, 1, 1], 0]"),
        ("mid_block_type", "\"UNetMidBlock2D\""),
    ];
    assert_eq!(count(SDXL, &ssd_1b), 1_331_334_404);
}

#[test]
fn settings_that_are_not_computed_are_refused_by_name() {
    for (name, value) in [
        ("class_embed_type", "\"timestep\""),
        ("time_cond_proj_dim", "256"),
        ("encoder_hid_dim_type", "\"text_proj\""),
        ("resnet_time_scale_shift", "\"scale_shift\""),
        ("act_fn", "\"gelu\""),
        ("only_cross_attention", "true"),
        ("only_cross_attention", "[false, true, false]"),
        // A list of lists is no list of levels.
        ("only_cross_attention", "[[false]]"),
    ] {
        let error = read(SDXL, &[(name, value)]).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(name), "{error}");
    }
    assert!(read(SDXL, &[("only_cross_attention", "[false, false, false]")]).is_ok());
    let error = read(SDXL, &[("up_block_types", r#"["AttnUpBlock2D"]"#)]).unwrap_err();
    assert!(error.to_string().contains("AttnUpBlock2D"), "{error}");
}

#[test]
fn contradictory_settings_are_refused() {
    for (change, part) in [
        (("attention_head_dim", "[5, 10]"), "attention_head_dim"),
        (("attention_head_dim", "[5, 10, 21]"), "split into 21"),
        (("block_out_channels", "[320, 640]"), "2 levels"),
        (("norm_num_groups", "0"), "norm_num_groups"),
        (("addition_time_embed_dim", "null"), "addition_time_embed_dim"),
        (("projection_class_embeddings_input_dim", "1536"), "leaves no width"),
        (("transformer_layers_per_block", "[1, [2, 2], 10]"), "reverse_transformer_layers_per_block"),
        (("layers_per_block", "9000000000000000000"), "layers_per_block"),
        (("in_channels", "9000000000000000000"), "in_channels"),
        (("projection_class_embeddings_input_dim", "-9223372036854775808"), "projection_class_embeddings_input_dim"),
    ] {
        let error = UNet::count_parameters(&read(SDXL, &[change]).unwrap()).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// A network of two small levels on zeros that occupy no memory.
fn tiny(changes: &[(&str, &str)]) -> UNet {
    let settings = [
        ("block_out_channels", "[8, 16]"),
        ("attention_head_dim", "2"),
        ("cross_attention_dim", "12"),
        ("norm_num_groups", "4"),
        ("down_block_types", r#"["DownBlock2D", "CrossAttnDownBlock2D"]"#),
        ("up_block_types", r#"["CrossAttnUpBlock2D", "UpBlock2D"]"#),
    ];
    let nothing = Weights::none();
    UNet::new(&nothing.root(Kind::Float, Device::Cpu), read("{}", &[&settings[..], changes].concat()).unwrap()).unwrap()
}

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

#[test]
fn features_come_in_order_with_the_size_after_resampling() {
    // 7 is odd: the way up must come back to it.
    let output = tiny(&[]).forward(&zeros(&[2, 4, 7, 6]), &zeros(&[2]), &zeros(&[2, 5, 12]), None).unwrap();
    let shapes: Vec<_> = output.features.iter().map(Tensor::size).collect();
    assert_eq!(shapes, [[2, 8, 4, 3], [2, 16, 4, 3], [2, 16, 4, 3], [2, 16, 7, 6], [2, 8, 7, 6]]);
    assert_eq!(output.sample.size(), [2, 4, 7, 6]);

    let without_mid = tiny(&[("mid_block_type", "null")]);
    assert_eq!(without_mid.num_features(), 4);
    assert_eq!(without_mid.forward(&zeros(&[1, 4, 4, 4]), &zeros(&[1]), &zeros(&[1, 5, 12]), None).unwrap().features.len(), 4);
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let plain = tiny(&[]);
    let (sample, time, text) = (zeros(&[2, 4, 8, 8]), zeros(&[2]), zeros(&[2, 5, 12]));
    assert!(plain.forward(&zeros(&[2, 3, 8, 8]), &time, &text, None).is_err());
    assert!(plain.forward(&sample, &zeros(&[1]), &text, None).is_err());
    assert!(plain.forward(&sample, &time, &zeros(&[1, 5, 12]), None).is_err());
    assert!(plain.forward(&sample, &time, &zeros(&[2, 12]), None).is_err());
    let added = |pooled: &[i64]| Added { pooled: zeros(pooled), time_ids: zeros(&[2, 6]) };
    assert!(plain.forward(&sample, &time, &text, Some(&added(&[2, 6]))).is_err());

    let text_time =
        [("addition_embed_type", "\"text_time\""), ("addition_time_embed_dim", "4"), ("projection_class_embeddings_input_dim", "30")];
    let sdxl = tiny(&text_time);
    assert!(sdxl.forward(&sample, &time, &text, None).is_err());
    assert!(sdxl.forward(&sample, &time, &text, Some(&added(&[2, 7]))).is_err());
    assert!(sdxl.forward(&sample, &time, &text, Some(&added(&[2, 6]))).is_ok());
}
