//! What it computes is compared with diffusers by the golden cases; here are its sizes and its refusals.

use super::*;

/// The shaping settings of the ControlNets published for stable-diffusion-xl-base-1.0.
const SDXL: &str = r#"{
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "controlnet_conditioning_channel_order": "rgb", "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "global_pool_conditions": false,
    "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": true
}"#;

/// Two small levels that take pooled text.
const SMALL: &str = r#"{
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "attention_head_dim": 2, "block_out_channels": [8, 16],
    "conditioning_embedding_out_channels": [4, 6], "cross_attention_dim": 12, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "projection_class_embeddings_input_dim": 30
}"#;

/// Reads a configuration with some settings changed.
fn read(text: &str, changes: &[(&str, &str)]) -> Result<ControlNetConfig> {
    let mut settings: serde_json::Value = serde_json::from_str(text).unwrap();
    for (name, value) in changes {
        settings[name] = serde_json::from_str(value).unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), settings.to_string()).unwrap();
    ControlNetConfig::read(file.path())
}

/// Diffusers' own totals: `ControlNetModel` of these settings on its meta device.
#[test]
fn parameter_totals_of_the_published_networks() {
    let count = |config: &ControlNetConfig| ControlNet::count_parameters(config).unwrap();
    assert_eq!(count(&read(SDXL, &[]).unwrap()), 1_251_014_160);
    // SD1.5's is the default of diffusers but for the text width.
    assert_eq!(count(&read("{}", &[("cross_attention_dim", "768")]).unwrap()), 361_279_120);
}

#[test]
fn the_number_of_heads_has_two_names() {
    use crate::config::PerLevel;
    let heads = |changes: &[(&str, &str)]| read(SDXL, changes).unwrap().unet.attention_head_dim;
    let published = PerLevel::Each(vec![5, 10, 20]);
    assert_eq!(heads(&[("num_attention_heads", "null")]), published);
    assert_eq!(heads(&[("attention_head_dim", "64"), ("num_attention_heads", "[5, 10, 20]")]), published);
    assert_eq!(heads(&[("num_attention_heads", "2")]), PerLevel::Same(2));
}

#[test]
fn settings_that_are_not_computed_are_refused_by_name() {
    for (name, value) in [
        ("controlnet_conditioning_channel_order", "\"bgr\""),
        ("global_pool_conditions", "true"),
        ("class_embed_type", "\"timestep\""),
        ("encoder_hid_dim_type", "\"text_proj\""),
    ] {
        let error = read(SDXL, &[(name, value)]).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(name), "{error}");
    }
    for (name, value) in [
        ("mid_block_type", "null"),
        ("conditioning_embedding_out_channels", "[]"),
        ("conditioning_embedding_out_channels", "[16, 0]"),
        ("conditioning_channels", "-3"),
        ("block_out_channels", "[320, 640]"),
    ] {
        let error = ControlNet::count_parameters(&read(SDXL, &[(name, value)]).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Config { .. }) && error.to_string().contains(name), "{error}");
    }
}

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

/// On weights of zeros: the residuals have the shapes of the skip connections, and an untrained ControlNet adds nothing.
#[test]
fn there_is_one_residual_for_each_skip_connection_and_one_for_the_middle() {
    let nothing = Weights::none();
    let network = ControlNet::new(&nothing.root(Kind::Float, Device::Cpu), read(SMALL, &[]).unwrap()).unwrap();
    assert_eq!((network.text_width(), network.pooled_width(), network.config().downscale()), (12, Some(6), 2));
    let added = Added { pooled: zeros(&[2, 6]), time_ids: zeros(&[2, 6]) };
    let forward = |image: &[i64], added: Option<&Added>| {
        let options = ControlOptions { image: &zeros(image), scale: 1.0, mask: None };
        network.forward(&zeros(&[2, 4, 7, 6]), &zeros(&[2]), &zeros(&[2, 5, 12]), added, &options)
    };
    // 7 is odd, and halved to 4.
    let residuals = forward(&[2, 3, 14, 12], Some(&added)).unwrap();
    let shapes: Vec<_> = residuals.down.iter().map(Tensor::size).collect();
    assert_eq!(shapes, [[2, 8, 7, 6], [2, 8, 7, 6], [2, 8, 7, 6], [2, 8, 4, 3], [2, 16, 4, 3], [2, 16, 4, 3]]);
    assert_eq!(residuals.mid.size(), [2, 16, 4, 3]);
    assert_eq!(residuals.down.iter().map(|residual| residual.abs().sum(Kind::Float).double_value(&[])).sum::<f64>(), 0.0);

    for image in [&[2, 3, 7, 6][..], &[1, 3, 14, 12], &[2, 1, 14, 12], &[2, 3, 14]] {
        let error = forward(image, Some(&added)).unwrap_err().to_string();
        assert!(error.contains("ControlNet::forward") && error.contains("wanted [2, 3, 14, 12]"), "{error}");
    }
    assert!(forward(&[2, 3, 14, 12], None).unwrap_err().to_string().contains("needs pooled text"));
    let (image, mask) = (zeros(&[2, 3, 14, 12]), zeros(&[2, 4]).gt(0));
    let options = ControlOptions { image: &image, scale: 1.0, mask: Some(&mask) };
    let error = network.forward(&zeros(&[2, 4, 7, 6]), &zeros(&[2]), &zeros(&[2, 5, 12]), Some(&added), &options).unwrap_err();
    assert!(error.to_string().contains("ControlNet::forward") && error.to_string().contains("a mask of Bool [2, 4]"), "{error}");
}
