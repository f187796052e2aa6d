//! A solver's way from noise to data as a list of linear updates: what all schedulers have in common.

use std::fmt;
use std::str::FromStr;

use super::noise::{NoiseSchedule, linspace};
use super::{DpmConfig, FinalSigma, Prediction, TimestepSpacing, ddim, dpm, euler, lcm};

/// The schedulers that are computed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheduler {
    /// DPM-Solver++ 2M: second order, multistep, in the data prediction.
    DpmSolver,
    /// Euler's method on the probability flow.
    Euler,
    /// Euler's method that goes below each noise level and adds fresh noise.
    EulerAncestral,
    /// DDIM without noise.
    Ddim,
    /// Latent consistency sampling: to the data in each step, then noise again.
    Lcm,
}

impl Scheduler {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::DpmSolver, Self::Euler, Self::EulerAncestral, Self::Ddim, Self::Lcm];

    /// The name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::DpmSolver => "dpm++",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler-a",
            Self::Ddim => "ddim",
            Self::Lcm => "lcm",
        }
    }

    /// The scheduler of a class of diffusers, as a `scheduler_config.json` names it; `None` for one that is not computed here.
    pub fn of_class(class: &str) -> Option<Self> {
        Some(match class {
            "DPMSolverMultistepScheduler" => Self::DpmSolver,
            "EulerDiscreteScheduler" => Self::Euler,
            "EulerAncestralDiscreteScheduler" => Self::EulerAncestral,
            "DDIMScheduler" => Self::Ddim,
            "LCMScheduler" => Self::Lcm,
            _ => return None,
        })
    }
}

/// For people to read.
impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DpmSolver => "DPM-Solver++ 2M",
            Self::Euler => "Euler",
            Self::EulerAncestral => "Euler ancestral",
            Self::Ddim => "DDIM",
            Self::Lcm => "LCM",
        })
    }
}

impl FromStr for Scheduler {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|scheduler| scheduler.name() == name).ok_or_else(|| format!("known are {}", known()))
    }
}

/// The choices that shape a solver's way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SolverConfig {
    /// The algorithm.
    pub scheduler: Scheduler,
    /// How timesteps are spread; `None` leaves it to the scheduler: DDIM's are then leading, the others' linspaced. LCM has a way of its
    /// own.
    pub spacing: Option<TimestepSpacing>,
    /// Added to each timestep; used by [`TimestepSpacing::Leading`] only.
    pub steps_offset: usize,
    /// Where the last step lands; `None` leaves it to the scheduler. DPM-Solver++ and Euler only: the others end without noise.
    pub final_sigma: Option<FinalSigma>,
    /// What the network predicts.
    pub prediction: Prediction,
    /// Noise levels after Karras et al.; DPM-Solver++ and Euler only.
    pub karras: bool,
    /// Whether DDIM's last step lands at no noise rather than at that of timestep 0.
    pub ends_clean: bool,
    /// Timesteps that the consistency model was distilled on.
    pub lcm_steps: usize,
    /// What LCM multiplies timesteps by in its boundary conditions.
    pub lcm_timestep_scaling: f64,
}

impl SolverConfig {
    /// How timesteps are spread, by the scheduler where nobody says.
    pub fn spacing(&self) -> TimestepSpacing {
        let usual = if self.scheduler == Scheduler::Ddim { TimestepSpacing::Leading } else { TimestepSpacing::Linspace };
        self.spacing.unwrap_or(usual)
    }

    /// What DPM-Solver++ reads of it. Published configurations are older than the key for the last step's noise: where it is absent
    /// the step lands at the noise of timestep 0, as it did in the diffusers that PEA was published with (since 0.27 it would end at zero).
    pub fn dpm(&self) -> DpmConfig {
        let &Self { steps_offset, final_sigma, prediction, .. } = self;
        DpmConfig { spacing: self.spacing(), steps_offset, final_sigma: final_sigma.unwrap_or(FinalSigma::SigmaMin), prediction }
    }
}

/// One step of a solver, as coefficients of an update that is linear in sample, network output, data predictions and fresh noise.
///
/// ```text
/// output = network(input_scale * sample, timestep)
/// data   = data_from_sample * sample + data_from_output * output
/// target = data + correction * (data - previous data)            a first step has no previous data: its correction is left out
/// sample = sample_scale * sample + target_scale * target + noise_scale * noise
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SolverStep {
    /// The timestep given to the network; Euler visits some between the whole ones.
    pub timestep: f64,
    /// Shares of data and of noise in a sample that begins at this step.
    pub noised: [f64; 2],
    /// Share of the sample that the network sees.
    pub input_scale: f64,
    /// Share of the sample in the data prediction.
    pub data_from_sample: f64,
    /// Share of the network output in the data prediction.
    pub data_from_output: f64,
    /// How far the data prediction is extrapolated along its last change; 0 for a first-order step.
    pub correction: f64,
    /// Share of the sample in the next sample.
    pub sample_scale: f64,
    /// Share of the target in the next sample.
    pub target_scale: f64,
    /// Share of fresh noise in the next sample; 0 where none is needed.
    pub noise_scale: f64,
}

/// All steps of a solver.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What standard normal noise is multiplied by to begin at the first step with nothing else.
    pub initial_scale: f64,
    /// The steps in order.
    pub steps: Vec<SolverStep>,
}

/// A number of steps that a scheduler cannot make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImpossiblePlan {
    /// The most steps it can make.
    pub most: usize,
}

impl Plan {
    /// Plans `num_steps` steps from pure noise to data.
    ///
    /// Errors: [`ImpossiblePlan`] unless there is at least one step, and fewer than the model has timesteps (LCM: no more than it was
    /// distilled on).
    pub fn new(schedule: &NoiseSchedule, config: &SolverConfig, num_steps: usize) -> Result<Self, ImpossiblePlan> {
        let mut most = schedule.len().saturating_sub(1);
        if config.scheduler == Scheduler::Lcm {
            most = most.min(config.lcm_steps);
        }
        if !(1..=most).contains(&num_steps) {
            return Err(ImpossiblePlan { most });
        }
        Ok(match config.scheduler {
            Scheduler::DpmSolver => Self { initial_scale: 1.0, steps: dpm::plan(schedule, &config.dpm(), config.karras, num_steps) },
            Scheduler::Euler => euler::plan(schedule, config, num_steps, false),
            Scheduler::EulerAncestral => euler::plan(schedule, config, num_steps, true),
            Scheduler::Ddim => Self { initial_scale: 1.0, steps: ddim::plan(schedule, config, num_steps) },
            Scheduler::Lcm => Self { initial_scale: 1.0, steps: lcm::plan(schedule, config, num_steps) },
        })
    }
}

/// The timesteps of Euler and DDIM, from noise to data. (DPM-Solver++ leaves room for the one where it lands.)
pub(super) fn spaced(schedule: &NoiseSchedule, config: &SolverConfig, num_steps: usize) -> Vec<f64> {
    let num_train = schedule.len();
    match config.spacing() {
        TimestepSpacing::Linspace => linspace(0.0, num_train.saturating_sub(1) as f64, num_steps).into_iter().rev().collect(),
        TimestepSpacing::Leading => {
            let stride = num_train / num_steps;
            (0..num_steps).rev().map(|index| (index * stride + config.steps_offset) as f64).collect()
        }
        TimestepSpacing::Trailing => {
            let stride = num_train as f64 / num_steps as f64;
            (0..num_steps).map(|index| (num_train as f64 - index as f64 * stride).round_ties_even() - 1.0).map(|t| t.max(0.0)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::NoiseConfig;

    fn config(scheduler: Scheduler) -> SolverConfig {
        SolverConfig {
            scheduler,
            spacing: Some(TimestepSpacing::Leading),
            steps_offset: 1,
            final_sigma: Some(FinalSigma::Zero),
            prediction: Prediction::Epsilon,
            karras: false,
            ends_clean: true,
            lcm_steps: 50,
            lcm_timestep_scaling: 10.0,
        }
    }

    fn stable_diffusion() -> NoiseSchedule {
        NoiseSchedule::new(&NoiseConfig::default())
    }

    /// With a network that knows the one clean image there is, every solver must return it, from wherever it begins.
    #[test]
    fn a_perfect_network_is_followed_to_the_clean_image_by_every_scheduler() {
        let (clean, eps, schedule) = (0.7, -1.3, stable_diffusion());
        let spacings = [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing];
        for scheduler in Scheduler::ALL {
            for (spacing, prediction, karras, start) in spacings
                .into_iter()
                .flat_map(|spacing| [Prediction::Epsilon, Prediction::Velocity].map(|prediction| (spacing, prediction)))
                .flat_map(|(spacing, prediction)| {
                    [(false, 0), (true, 0), (false, 3)].map(|(karras, start)| (spacing, prediction, karras, start))
                })
            {
                let config = SolverConfig { spacing: Some(spacing), prediction, karras, ..config(scheduler) };
                let plan = Plan::new(&schedule, &config, 12).unwrap();
                let [signal, noise] = plan.steps[start].noised;
                let (mut sample, mut previous) = (signal * clean + noise * eps, clean);
                for step in &plan.steps[start..] {
                    // The network sees a sample of unit variance: `a * clean + b * noise`, where the squares of a and b sum to 1.
                    let [a, b] = step.noised.map(|share| share * step.input_scale);
                    assert!((a * a + b * b - 1.0).abs() < 1e-9, "{scheduler:?}");
                    let noise = (step.input_scale * sample - a * clean) / b;
                    let output = match prediction {
                        Prediction::Epsilon => noise,
                        Prediction::Velocity => a * noise - b * clean,
                    };
                    let data = step.data_from_sample * sample + step.data_from_output * output;
                    let target = data + step.correction * (data - previous);
                    sample = step.sample_scale * sample + step.target_scale * target + step.noise_scale * 0.4;
                    previous = data;
                }
                // LCM's boundary condition leaves a trace of the sample.
                let tolerance = if scheduler == Scheduler::Lcm { 1e-5 } else { 1e-9 };
                assert!((sample - clean).abs() < tolerance, "{config:?} from step {start}: {sample}");
            }
        }
    }

    #[test]
    fn initial_noise_has_the_scale_of_the_first_step() {
        let schedule = stable_diffusion();
        for (spacing, wanted) in
            [(TimestepSpacing::Trailing, schedule.sigma(999)), (TimestepSpacing::Leading, schedule.sigma(901).hypot(1.0))]
        {
            let config = SolverConfig { spacing: Some(spacing), ..config(Scheduler::Euler) };
            assert!((Plan::new(&schedule, &config, 10).unwrap().initial_scale - wanted).abs() < 1e-12);
        }
        assert_eq!(Plan::new(&schedule, &config(Scheduler::Ddim), 10).unwrap().initial_scale, 1.0);
    }

    #[test]
    fn lcm_visits_the_timesteps_it_was_distilled_on() {
        let visited = |num_steps| -> Vec<f64> {
            Plan::new(&stable_diffusion(), &config(Scheduler::Lcm), num_steps).unwrap().steps.iter().map(|step| step.timestep).collect()
        };
        assert_eq!(visited(5), [999.0, 799.0, 599.0, 399.0, 199.0]);
        assert_eq!(visited(1), [999.0]);
        assert_eq!(Plan::new(&stable_diffusion(), &config(Scheduler::Lcm), 51), Err(ImpossiblePlan { most: 50 }));
        assert_eq!(Plan::new(&stable_diffusion(), &config(Scheduler::Euler), 1000), Err(ImpossiblePlan { most: 999 }));
        assert_eq!(Plan::new(&stable_diffusion(), &config(Scheduler::Euler), 0), Err(ImpossiblePlan { most: 999 }));
    }

    #[test]
    fn turbo_takes_one_step_from_the_last_timestep() {
        let config = SolverConfig { spacing: Some(TimestepSpacing::Trailing), ..config(Scheduler::EulerAncestral) };
        let plan = Plan::new(&stable_diffusion(), &config, 1).unwrap();
        assert_eq!((plan.steps.len(), plan.steps[0].timestep, plan.steps[0].noise_scale), (1, 999.0, 0.0));
    }

    #[test]
    fn names_are_read_back() {
        for scheduler in Scheduler::ALL {
            assert_eq!(scheduler.name().parse(), Ok(scheduler));
        }
        assert!("plms".parse::<Scheduler>().unwrap_err().contains("euler-a"));
        assert_eq!(Scheduler::of_class("PNDMScheduler"), None);
    }
}
