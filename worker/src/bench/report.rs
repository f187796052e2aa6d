//! What was measured, for people and for programs.

use std::fmt::Write as _;

use serde::Serialize;

/// What was measured. Times are means over the timed steps, in milliseconds. On a GPU the stages are those of steps that wait for it after
/// each of them, and are more together than a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    pub model: String,
    pub device: String,
    pub dtype: String,
    pub fp8_linears: bool,
    pub vae_dtype: String,
    /// On a GPU, whether networks and autoencoder compute with fused operators.
    pub fused: Option<[bool; 2]>,
    pub batch: u32,
    pub native: u32,
    pub precomputed: bool,
    /// Whether the next step's pictures and captions were encoded beside the step.
    pub encoded_ahead: bool,
    pub size: [i64; 2],
    pub threads: u32,
    pub steps: u32,
    pub encode_ms: f64,
    pub teacher_ms: f64,
    pub text_ms: f64,
    pub student_ms: f64,
    pub backward_ms: f64,
    pub update_ms: f64,
    pub step_ms: f64,
    /// The longest of the steps whose stages were timed.
    pub slowest_step_ms: f64,
    pub samples_per_second: f64,
    /// 10^12 operations a sample by the method's counts; of the published sizes at 640x640 (SDXL) and 512x512 (SD1.5) alone.
    pub tflop_per_sample: Option<f64>,
    pub tflops: Option<f64>,
    /// Of products of large matrices in `dtype` on the same device.
    pub peak_tflops: Option<f64>,
    pub share_of_peak: Option<f64>,
    /// On a GPU, what is taken of its memory at the end, by all processes; on the CPU, the most this process ever held.
    pub memory_bytes: Option<u64>,
    /// Whether the last gradient was. A step of NaN may take another time than one of numbers.
    pub is_finite: bool,
}

impl Report {
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let [width, height] = self.size;
        let _ = writeln!(
            text,
            "{} on {}: {} of {width}x{height} ({} native{}) a step, networks in {}{}, autoencoder in {}{}",
            self.model,
            self.device,
            self.batch,
            self.native,
            match (self.precomputed, self.encoded_ahead) {
                (true, _) => ", precomputed",
                (_, true) => ", encoded beside the step before",
                _ => "",
            },
            self.dtype,
            if self.fp8_linears { " with linears in FP8" } else { "" },
            self.vae_dtype,
            match self.fused {
                Some([true, true]) => ", fused operators",
                Some([true, false]) => ", fused operators in the networks alone",
                Some([false, true]) => ", fused operators in the autoencoder alone",
                Some([false, false]) => ", libtorch's operators",
                None => "",
            }
        );
        let parts = [
            ("pictures to latents", self.encode_ms),
            ("teacher", self.teacher_ms),
            ("text and adapter", self.text_ms),
            ("student forward", self.student_ms),
            ("backward", self.backward_ms),
            ("update", self.update_ms),
        ];
        let sum: f64 = parts.iter().map(|(_, time)| time).sum();
        for (part, time) in parts {
            let _ = writeln!(text, "  {part:<22}{time:>10.2} ms {:>5.1} %", 100.0 * time / sum);
        }
        let _ = writeln!(
            text,
            "  {:<22}{:>10.2} ms, {:.2} samples/s; the slowest with a clock at each stage {:.2} ms",
            "step", self.step_ms, self.samples_per_second, self.slowest_step_ms
        );
        if let Some(tflops) = self.tflops {
            let _ = writeln!(text, "  {tflops:.1} TFLOP/s by the method's counts");
        }
        if let Some(peak) = self.peak_tflops {
            let share = self.share_of_peak.map_or(String::new(), |share| format!(", of which the step has {:.1} %", 100.0 * share));
            let _ = writeln!(text, "  {peak:.2} TFLOP/s in products of large matrices{share}");
        }
        if let Some(bytes) = self.memory_bytes {
            let _ = writeln!(text, "  {:.2} GB of memory", bytes as f64 / 1e9);
        }
        if !self.is_finite {
            let _ = writeln!(text, "  the gradient was not finite: with other --dtype or --vae-dtype it may be");
        }
        text
    }
}
