//! What a model's `scheduler_config.json` says about noise and sampling.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::config::{Supported, parse_config, read_config, unsupported_setting};
use crate::schedule::{
    BetaSchedule, FinalSigma, ImpossiblePlan, NoiseConfig, NoiseSchedule, Plan, Prediction, Scheduler, SolverConfig, TimestepSpacing,
};
use crate::{Error, Result};

/// Settings that change the solver in ways not computed here, with the values that leave it as it is.
const SUPPORTED: &[Supported] = &[
    ("beta_schedule", r#"["linear", "scaled_linear", "squaredcos_cap_v2"]"#),
    ("prediction_type", r#"["epsilon", "v_prediction"]"#),
    ("timestep_spacing", r#"["linspace", "leading", "trailing"]"#),
    ("final_sigmas_type", r#"["zero", "sigma_min"]"#),
    ("interpolation_type", r#"["linear"]"#),
    ("sigma_max", "[null]"),
    ("sigma_min", "[null]"),
    ("timestep_type", r#"["discrete"]"#),
    ("thresholding", "[false, null]"),
    ("use_beta_sigmas", "[false, null]"),
    ("use_exponential_sigmas", "[false, null]"),
    ("use_flow_sigmas", "[false, null]"),
    ("use_lu_lambdas", "[false, null]"),
];

/// Likewise of DPM-Solver alone, with the values that make DPM-Solver++ 2M of it; diffusers takes two names of other solvers' for the first
/// and the third of these.
const DPM_SUPPORTED: &[Supported] = &[
    ("algorithm_type", r#"["dpmsolver++", "deis"]"#),
    ("solver_order", "[2]"),
    ("solver_type", r#"["midpoint", "logrho", "bh1", "bh2"]"#),
    ("lower_order_final", "[true]"),
    ("euler_at_final", "[false, null]"),
    // A limit leaves out the timesteps of least signal.
    ("lambda_min_clipped", "[null]"),
];

/// How the names of the classes begin that read [`DPM_SUPPORTED`].
const DPM_CLASSES: &str = "DPMSolverMultistep";

/// The noise schedule a model was trained with, and how it asks to be sampled.
///
/// The file may have been written for any scheduler of diffusers; what it says serves all that are computed here.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    /// The noise schedule.
    pub noise: NoiseConfig,
    /// The solver's choices, with the scheduler that the file was written for, or DPM-Solver++ 2M for one that is not computed here.
    pub solver: SolverConfig,
    /// Whether the file asks for data predictions to be clipped, which only some schedulers do.
    clips: bool,
    /// The first setting of the scheduler that the file was written for which makes another solver of it than is computed here.
    other_solver: Option<String>,
}

/// What is asked of a solver instead of what the model's configuration says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SolverChoice {
    /// The scheduler; `None` takes the one that the configuration was written for.
    pub scheduler: Option<Scheduler>,
    /// How timesteps are spread.
    pub spacing: Option<TimestepSpacing>,
    /// Whether noise levels are those of Karras et al.
    pub karras: Option<bool>,
}

impl SolverChoice {
    /// A scheduler, and else what the configuration says.
    pub const fn of(scheduler: Scheduler) -> Self {
        Self { scheduler: Some(scheduler), spacing: None, karras: None }
    }
}

/// The file itself; absent keys have the defaults of diffusers. (It would also clip data predictions where `clip_sample` is absent: latents
/// are meant to go beyond 1, and all published configurations say so.)
#[derive(Debug, Deserialize)]
#[serde(default)]
struct File {
    num_train_timesteps: usize,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: String,
    trained_betas: Option<Vec<f64>>,
    prediction_type: String,
    timestep_spacing: Option<String>,
    steps_offset: usize,
    final_sigmas_type: Option<String>,
    rescale_betas_zero_snr: Option<bool>,
    #[serde(rename = "_class_name")]
    class: String,
    use_karras_sigmas: Option<bool>,
    set_alpha_to_one: bool,
    clip_sample: Option<bool>,
    original_inference_steps: usize,
    timestep_scaling: f64,
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
            timestep_spacing: None,
            steps_offset: 0,
            final_sigmas_type: None,
            rescale_betas_zero_snr: None,
            class: String::new(),
            use_karras_sigmas: None,
            set_alpha_to_one: true,
            clip_sample: None,
            original_inference_steps: 50,
            timestep_scaling: 10.0,
        }
    }
}

impl SchedulerConfig {
    /// Reads `scheduler/scheduler_config.json` of a model folder.
    ///
    /// Errors: [`crate::Error::Io`], [`crate::Error::Invalid`] for damaged JSON or betas outside (0, 1), [`crate::Error::Unsupported`]
    /// naming a setting whose value is not computed here.
    pub fn load(model_dir: &Path) -> Result<Self> {
        let path = model_dir.join("scheduler").join("scheduler_config.json");
        let settings = read_config(&path, &[])?;
        Self::parse(&path, settings)
    }

    /// As [`SchedulerConfig::load`], of settings that were read already; `path` names them in errors.
    pub(crate) fn parse(path: &Path, settings: Value) -> Result<Self> {
        let other = unsupported_setting(&settings, DPM_SUPPORTED);
        let file: File = parse_config(path, settings, SUPPORTED)?;
        let betas_are_sane = match &file.trained_betas {
            Some(betas) => !betas.is_empty() && betas.iter().all(|&beta| beta > 0.0 && beta < 1.0),
            None => file.num_train_timesteps > 0 && file.beta_start > 0.0 && file.beta_start <= file.beta_end && file.beta_end < 1.0,
        };
        if !betas_are_sane {
            let reason = "betas must be above 0 and below 1, and there must be at least one".into();
            return Err(Error::Invalid { path: path.into(), reason });
        }
        let zero_terminal_snr = file.rescale_betas_zero_snr.unwrap_or(false);
        if zero_terminal_snr && file.prediction_type == "epsilon" {
            let hint = format!(
                "{}: noise cannot be predicted where there is nothing else; such models have prediction_type \"v_prediction\"",
                path.display()
            );
            return Err(Error::Unsupported { what: "rescale_betas_zero_snr = true with prediction_type \"epsilon\"".into(), hint });
        }
        // `parse_config` has let through the values matched here only.
        let beta_schedule = match (file.trained_betas, file.beta_schedule.as_str()) {
            (Some(betas), _) => BetaSchedule::Trained(betas),
            (None, "scaled_linear") => BetaSchedule::ScaledLinear,
            (None, "squaredcos_cap_v2") => BetaSchedule::SquaredCosine,
            (None, _) => BetaSchedule::Linear,
        };
        let final_sigma = |name: &str| if name == "zero" { FinalSigma::Zero } else { FinalSigma::SigmaMin };
        Ok(Self {
            noise: NoiseConfig {
                num_train_timesteps: file.num_train_timesteps,
                beta_start: file.beta_start,
                beta_end: file.beta_end,
                beta_schedule,
                zero_terminal_snr,
            },
            solver: SolverConfig {
                scheduler: Scheduler::of_class(&file.class).unwrap_or(Scheduler::DpmSolver),
                spacing: file.timestep_spacing.as_deref().and_then(TimestepSpacing::named),
                steps_offset: file.steps_offset,
                final_sigma: file.final_sigmas_type.as_deref().map(final_sigma),
                prediction: if file.prediction_type == "v_prediction" { Prediction::Velocity } else { Prediction::Epsilon },
                karras: file.use_karras_sigmas.unwrap_or(false),
                ends_clean: file.set_alpha_to_one,
                lcm_steps: file.original_inference_steps,
                lcm_timestep_scaling: file.timestep_scaling,
            },
            clips: file.clip_sample.unwrap_or(false),
            other_solver: other.map(|(setting, _)| setting).filter(|_| file.class.starts_with(DPM_CLASSES)),
        })
    }

    /// The solver's choices with what is asked instead.
    pub fn solver_with(&self, choice: SolverChoice) -> SolverConfig {
        let SolverChoice { scheduler, spacing, karras } = choice;
        let own = self.solver;
        SolverConfig {
            scheduler: scheduler.unwrap_or(own.scheduler),
            spacing: spacing.or(own.spacing),
            karras: karras.unwrap_or(own.karras),
            ..own
        }
    }

    /// Plans `num_steps` steps.
    ///
    /// Errors: [`Error::Unsupported`] for a number of steps that the scheduler cannot make, for Karras' noise levels with a scheduler that
    /// has none, for DDIM and LCM where the configuration asks for clipping, or for the model's own DPM-Solver where it is another than is
    /// computed here.
    pub fn plan(&self, choice: SolverChoice, num_steps: usize) -> Result<Plan> {
        let config = self.solver_with(choice);
        let scheduler = config.scheduler;
        let unsupported = |what: String, hint: String| Err(Error::Unsupported { what, hint });
        if let (None, Some(setting)) = (choice.scheduler, &self.other_solver) {
            let names = Scheduler::ALL.map(Scheduler::name).join(", ");
            return unsupported(format!("{setting} of the model's own scheduler"), format!("give --scheduler, one of {names}"));
        }
        if choice.karras == Some(true) && !matches!(scheduler, Scheduler::DpmSolver | Scheduler::Euler) {
            let hint = format!("{} and {} can have them", Scheduler::DpmSolver.name(), Scheduler::Euler.name());
            return unsupported(format!("{scheduler} with Karras' noise levels"), hint);
        }
        if self.clips && matches!(scheduler, Scheduler::Ddim | Scheduler::Lcm) {
            return unsupported(format!("clip_sample = true with {scheduler}"), format!("{} does not clip", Scheduler::DpmSolver.name()));
        }
        Plan::new(&NoiseSchedule::new(&self.noise), &config, num_steps).or_else(|ImpossiblePlan { most }| {
            let what = format!("sampling in {num_steps} steps with {scheduler}");
            unsupported(what, format!("between 1 and {most} are possible with this model"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let wanted = SolverConfig {
            scheduler: Scheduler::Euler,
            spacing: Some(TimestepSpacing::Leading),
            steps_offset: 1,
            final_sigma: None,
            prediction: Prediction::Epsilon,
            karras: false,
            ends_clean: false,
            lcm_steps: 50,
            lcm_timestep_scaling: 10.0,
        };
        assert_eq!(config.solver, wanted);
        assert_eq!(config.solver.dpm().final_sigma, FinalSigma::SigmaMin);
    }

    #[test]
    fn absent_keys_have_the_defaults_of_diffusers() {
        let config = load("{}").unwrap();
        assert_eq!((config.noise.beta_schedule, config.noise.beta_end), (BetaSchedule::Linear, 0.02));
        assert_eq!((config.solver.spacing(), config.solver.steps_offset), (TimestepSpacing::Linspace, 0));
        assert_eq!((config.solver.scheduler, config.solver.ends_clean), (Scheduler::DpmSolver, true));
    }

    #[test]
    fn what_is_asked_replaces_what_the_model_says() {
        let config = load(r#"{"_class_name": "DDIMScheduler", "clip_sample": true}"#).unwrap();
        assert_eq!(config.solver.spacing(), TimestepSpacing::Leading);
        assert!(config.plan(SolverChoice::default(), 10).unwrap_err().to_string().contains("clip_sample = true with DDIM"));
        let choice = SolverChoice { spacing: Some(TimestepSpacing::Trailing), karras: Some(true), ..SolverChoice::of(Scheduler::Euler) };
        let solver = config.solver_with(choice);
        assert_eq!((solver.scheduler, solver.spacing(), solver.karras), (Scheduler::Euler, TimestepSpacing::Trailing, true));
        assert!(config.plan(choice, 10).is_ok());
        let ancestral = SolverChoice { scheduler: Some(Scheduler::EulerAncestral), ..choice };
        assert!(config.plan(ancestral, 10).unwrap_err().to_string().contains("Karras"));
        assert!(config.plan(choice, 1000).unwrap_err().to_string().contains("between 1 and 999"));
    }

    /// The first file is what diffusers 0.35 saves of `DPMSolverMultistepScheduler()`, but for what is common to all schedulers.
    #[test]
    fn another_dpm_solver_of_the_model_is_refused_unless_a_scheduler_is_asked_for() {
        let own = r#"{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "dynamic_thresholding_ratio": 0.995,
            "euler_at_final": false, "final_sigmas_type": "zero", "flow_shift": 1.0, "lambda_min_clipped": -Infinity,
            "lower_order_final": true, "rescale_betas_zero_snr": false, "sample_max_value": 1.0, "solver_order": 2,
            "solver_type": "midpoint", "thresholding": false, "use_lu_lambdas": false, "variance_type": null}"#;
        let (as_is, chosen) = (SolverChoice::default(), SolverChoice::of(Scheduler::DpmSolver));
        assert!(load(own).unwrap().plan(as_is, 10).is_ok());
        assert!(load(&own.replace("midpoint", "bh2").replace("\"dpmsolver++\"", "\"deis\"")).unwrap().plan(as_is, 10).is_ok());
        for (from, to) in [
            ("\"algorithm_type\": \"dpmsolver++\"", "\"algorithm_type\": \"sde-dpmsolver++\""),
            ("\"solver_order\": 2", "\"solver_order\": 3"),
            ("\"solver_type\": \"midpoint\"", "\"solver_type\": \"heun\""),
            ("\"lower_order_final\": true", "\"lower_order_final\": false"),
            ("\"euler_at_final\": false", "\"euler_at_final\": true"),
            ("\"lambda_min_clipped\": -Infinity", "\"lambda_min_clipped\": -5.1"),
        ] {
            let other = load(&own.replace(from, to)).unwrap();
            let error = other.plan(as_is, 10).unwrap_err().to_string();
            assert!(error.contains(&to.replacen("\":", " =", 1)[1..]) && error.contains("give --scheduler"), "{error}");
            assert!(other.plan(chosen, 10).is_ok());
        }
        // Files written for other schedulers may have settings of the same names.
        for class in ["EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "LCMScheduler"] {
            let config = format!(r#"{{"_class_name": "{class}", "solver_order": 3, "lower_order_final": false, "clip_sample": false}}"#);
            assert!(load(&config).unwrap().plan(as_is, 10).is_ok(), "{class}");
        }
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
        let error = load(r#"{"use_lu_lambdas": true}"#).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("use_lu_lambdas = true"), "{error}");
        for json in
            ["", "7", r#"{"beta_end": 1.5}"#, r#"{"trained_betas": []}"#, r#"{"num_train_timesteps": 0}"#, r#"{"steps_offset": -1}"#]
        {
            assert!(matches!(load(json), Err(Error::Invalid { .. })), "{json}");
        }
    }
}
