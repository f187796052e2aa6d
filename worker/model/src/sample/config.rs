//! What a model's `scheduler_config.json` says about noise and sampling.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::Result;
use crate::config::{Supported, parse_config, read_config};
use crate::schedule::{BetaSchedule, DpmConfig, FinalSigma, NoiseConfig, Prediction, TimestepSpacing};

/// Settings that change the solver in ways not computed here, with the values that leave it as it is.
const SUPPORTED: &[Supported] = &[
    ("beta_schedule", r#"["linear", "scaled_linear", "squaredcos_cap_v2"]"#),
    ("prediction_type", r#"["epsilon", "v_prediction"]"#),
    ("timestep_spacing", r#"["linspace", "leading", "trailing"]"#),
    ("final_sigmas_type", r#"["zero", "sigma_min"]"#),
    ("thresholding", "[false, null]"),
    ("use_beta_sigmas", "[false, null]"),
    ("use_exponential_sigmas", "[false, null]"),
    ("use_flow_sigmas", "[false, null]"),
    ("use_karras_sigmas", "[false, null]"),
    ("use_lu_lambdas", "[false, null]"),
];

/// The noise schedule a model was trained with, and how it asks to be sampled.
///
/// The file may have been written for any scheduler of diffusers; the algorithm used here is always DPM-Solver++ 2M.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    /// The noise schedule.
    pub noise: NoiseConfig,
    /// The solver's choices.
    pub solver: DpmConfig,
}

/// The file itself; absent keys have the defaults of diffusers' DPM-Solver.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct File {
    num_train_timesteps: usize,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: String,
    trained_betas: Option<Vec<f64>>,
    prediction_type: String,
    timestep_spacing: String,
    steps_offset: usize,
    final_sigmas_type: String,
    rescale_betas_zero_snr: Option<bool>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: "linear".into(),
            trained_betas: None,
            prediction_type: "epsilon".into(),
            timestep_spacing: "linspace".into(),
            steps_offset: 0,
            // Published configurations are older than this key. Where it is absent the last step lands at the noise of timestep 0,
            // as it did in the diffusers that PEA was published with; diffusers since 0.27 would end at zero.
            final_sigmas_type: "sigma_min".into(),
            rescale_betas_zero_snr: None,
        }
    }
}

impl SchedulerConfig {
    /// Reads `scheduler/scheduler_config.json` of a model folder.
    ///
    /// Errors: [`crate::Error::Io`], [`crate::Error::Invalid`] for damaged JSON or betas outside (0, 1), [`crate::Error::Unsupported`]
    /// naming a setting whose value is not computed here (Karras sigmas, say).
    pub fn load(model_dir: &Path) -> Result<Self> {
        let path = model_dir.join("scheduler").join("scheduler_config.json");
        let settings = read_config(&path, &[])?;
        Self::parse(&path, settings)
    }

    /// As [`SchedulerConfig::load`], of settings that were read already; `path` names them in errors.
    pub(crate) fn parse(path: &Path, settings: Value) -> Result<Self> {
        let file: File = parse_config(path, settings, SUPPORTED)?;
        let betas_are_sane = match &file.trained_betas {
            Some(betas) => !betas.is_empty() && betas.iter().all(|&beta| beta > 0.0 && beta < 1.0),
            None => file.num_train_timesteps > 0 && file.beta_start > 0.0 && file.beta_start <= file.beta_end && file.beta_end < 1.0,
        };
        if !betas_are_sane {
            let reason = "betas must be above 0 and below 1, and there must be at least one".into();
            return Err(crate::Error::Invalid { path: path.into(), reason });
        }
        let zero_terminal_snr = file.rescale_betas_zero_snr.unwrap_or(false);
        if zero_terminal_snr && file.prediction_type == "epsilon" {
            let hint = format!(
                "{}: noise cannot be predicted where there is nothing else; such models have prediction_type \"v_prediction\"",
                path.display()
            );
            return Err(crate::Error::Unsupported { what: "rescale_betas_zero_snr = true with prediction_type \"epsilon\"".into(), hint });
        }
        // `parse_config` has let through the values matched here only.
        let beta_schedule = match (file.trained_betas, file.beta_schedule.as_str()) {
            (Some(betas), _) => BetaSchedule::Trained(betas),
            (None, "scaled_linear") => BetaSchedule::ScaledLinear,
            (None, "squaredcos_cap_v2") => BetaSchedule::SquaredCosine,
            (None, _) => BetaSchedule::Linear,
        };
        let spacing = match file.timestep_spacing.as_str() {
            "leading" => TimestepSpacing::Leading,
            "trailing" => TimestepSpacing::Trailing,
            _ => TimestepSpacing::Linspace,
        };
        Ok(Self {
            noise: NoiseConfig {
                num_train_timesteps: file.num_train_timesteps,
                beta_start: file.beta_start,
                beta_end: file.beta_end,
                beta_schedule,
                zero_terminal_snr,
            },
            solver: DpmConfig {
                spacing,
                steps_offset: file.steps_offset,
                final_sigma: if file.final_sigmas_type == "zero" { FinalSigma::Zero } else { FinalSigma::SigmaMin },
                prediction: if file.prediction_type == "v_prediction" { Prediction::Velocity } else { Prediction::Epsilon },
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn load(json: &str) -> Result<SchedulerConfig> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("scheduler")).unwrap();
        std::fs::write(dir.path().join("scheduler/scheduler_config.json"), json).unwrap();
        SchedulerConfig::load(dir.path())
    }

    #[test]
    fn the_configuration_of_sdxl_is_understood() {
        let config = load(
            r#"{"_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": false,
                "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": null,
                "use_karras_sigmas": false}"#,
        )
        .unwrap();
        assert_eq!(config.noise, NoiseConfig::default());
        let solver = DpmConfig {
            spacing: TimestepSpacing::Leading,
            steps_offset: 1,
            final_sigma: FinalSigma::SigmaMin,
            prediction: Prediction::Epsilon,
        };
        assert_eq!(config.solver, solver);
    }

    #[test]
    fn absent_keys_have_the_defaults_of_diffusers() {
        let config = load("{}").unwrap();
        assert_eq!((config.noise.beta_schedule, config.noise.beta_end), (BetaSchedule::Linear, 0.02));
        assert_eq!((config.solver.spacing, config.solver.steps_offset), (TimestepSpacing::Linspace, 0));
    }

    #[test]
    fn a_schedule_that_ends_without_signal_wants_velocity() {
        let config = load(r#"{"rescale_betas_zero_snr": true, "prediction_type": "v_prediction"}"#).unwrap();
        assert!(config.noise.zero_terminal_snr);
        let error = load(r#"{"rescale_betas_zero_snr": true}"#).unwrap_err();
        assert!(error.to_string().contains("v_prediction"), "{error}");
    }

    #[test]
    fn what_is_not_computed_is_named() {
        let error = load(r#"{"use_karras_sigmas": true}"#).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("use_karras_sigmas = true"), "{error}");
        for json in
            ["", "7", r#"{"beta_end": 1.5}"#, r#"{"trained_betas": []}"#, r#"{"num_train_timesteps": 0}"#, r#"{"steps_offset": -1}"#]
        {
            assert!(matches!(load(json), Err(Error::Invalid { .. })), "{json}");
        }
    }
}
