//! The job in numbers for Prometheus, made anew for each scrape: what is gone leaves no series behind.

use std::fmt;

use peapod_proto::PROGRAM_VERSION;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::Shown;
use crate::driver::Status;
use crate::history::{History, STEP_BOUNDS};

/// Of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics as text.
pub fn text(shown: &Shown, status: &Status, history: &History) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("peapod");
    registry.register_collector(Box::new(Metrics { shown: shown.clone(), status: status.clone(), history: history.clone() }));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Metrics {
    shown: Shown,
    status: Status,
    history: History,
}

type Labels = Vec<(&'static str, String)>;

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut out = Out(encoder);
        self.job(&mut out)?;
        self.steps(&mut out)?;
        self.data(&mut out)?;
        self.members(&mut out)?;
        self.workers(&mut out)
    }
}

impl Metrics {
    fn job(&self, out: &mut Out<'_>) -> fmt::Result {
        let Self { shown, history, .. } = self;
        let labels = vec![("job_name", shown.job.clone()), ("job_id", shown.job_id.clone()), ("version", PROGRAM_VERSION.into())];
        out.gauges("job_info", "The job that the coordinator runs: always 1.", None, [(labels, 1.0)])?;
        out.gauge("start_time", "When the coordinator started, since 1970.", Some(Unit::Seconds), history.started_unix)?;
        let seconds =
            history.goodput.settled(history.now).into_iter().map(|(cause, seconds)| (vec![("cause", cause.as_str().into())], seconds));
        out.counters(
            "time",
            "Time since the coordinator started by what it was spent on; final_steps is the good part.",
            Some(Unit::Seconds),
            seconds,
        )?;
        out.gauge(
            "goodput",
            "Share of the time since the coordinator started that went into final steps.",
            Some(Unit::Other("ratio".into())),
            history.goodput_ratio(),
        )
    }

    fn steps(&self, out: &mut Out<'_>) -> fmt::Result {
        let Self { shown, status, history } = self;
        out.gauge("final_step", "Last final step.", None, status.final_step.0 as f64)?;
        if let Some(last) = shown.last_step {
            out.gauge("last_step", "The step that ends the job.", None, last as f64)?;
        }
        out.counter("steps", "Steps that became final since the coordinator started.", None, history.counts.steps)?;
        out.counter("steps_skipped", "Steps that were not finite and changed no weights.", None, history.counts.skipped_steps)?;
        out.counter("step_samples", "Samples in final steps since the coordinator started.", None, history.counts.samples)?;
        out.histogram("step_duration", "Time from one final step to the next within a generation.", history)?;
        if let Some((_, losses, timings)) = &history.newest {
            let parts = [("task", losses.task), ("logit", losses.logit), ("feature", losses.feature)];
            out.gauges(
                "loss",
                "Mean losses of the newest final step.",
                None,
                parts.map(|(part, loss)| (vec![("part", part.into())], loss.into())),
            )?;
            out.gauge("gradient_norm", "Norm of the gradient of the newest final step.", None, losses.grad_norm.into())?;
            out.gauge("learning_rate", "Learning rate of the newest final step.", None, losses.learning_rate.into())?;
            let parts = [
                ("data", timings.data),
                ("compute", timings.compute),
                ("collective", timings.collective),
                ("update", timings.update),
                ("validation", timings.validation),
                ("pictures", timings.sampling),
            ];
            let parts = parts.map(|(part, seconds)| (vec![("part", part.into())], seconds.into()));
            out.gauges("step_part", "Where the time of the newest final step's slowest member went.", Some(Unit::Seconds), parts)?;
        }
        if let Some((losses, total)) = history.validations.last() {
            let parts =
                [("task", losses.task.into()), ("logit", losses.logit.into()), ("feature", losses.feature.into()), ("total", *total)];
            let parts = parts.map(|(part, loss): (&str, f64)| (vec![("part", part.into())], loss));
            out.gauges("validation_loss", "Mean losses on the validation samples, the newest.", None, parts)?;
            out.gauge("validation_step", "The step whose weights the newest validation is of.", None, losses.step.0 as f64)?;
        }
        Ok(())
    }

    fn data(&self, out: &mut Out<'_>) -> fmt::Result {
        let sources = &self.status.sources;
        let by = |kinds: fn(&crate::core::SourceView) -> Vec<(&'static str, f64)>, key: &'static str| {
            let all = sources.iter().flat_map(move |source| {
                kinds(source).into_iter().map(move |(kind, value)| (vec![("source", source.name.clone()), (key, kind.to_owned())], value))
            });
            all.collect::<Vec<_>>()
        };
        let shards = by(
            |source| {
                let pending = source.num_shards.saturating_sub(source.num_done + source.num_leased);
                vec![("pending", pending.into()), ("leased", source.num_leased.into()), ("done", source.num_done.into())]
            },
            "state",
        );
        out.gauges("shards", "Shards of a source in its first epoch that is not complete.", None, shards)?;
        let epochs = sources.iter().map(|source| (vec![("source", source.name.clone())], f64::from(source.epoch.0)));
        out.gauges("epoch", "A source's first epoch that is not complete.", None, epochs)?;
        let samples = by(
            |source| {
                let totals = &source.totals;
                let counts =
                    [("trained", totals.committed), ("filtered", totals.filtered), ("bad", totals.bad), ("not_finite", totals.not_finite)];
                counts.map(|(kind, count)| (kind, count as f64)).to_vec()
            },
            "outcome",
        );
        // A job that goes back takes samples back: a counter must not fall.
        out.gauges("ledger_samples", "Samples in the ledger by what became of them, over all epochs.", None, samples)
    }

    fn members(&self, out: &mut Out<'_>) -> fmt::Result {
        let Self { shown, status, history } = self;
        let counts = history.counts;
        out.gauge("generation", "Current generation.", None, status.generation.0 as f64)?;
        out.gauge("world_size", "Members of a whole world.", None, shown.world_size.into())?;
        out.gauge("workers", "Workers that are connected.", None, status.workers.len() as f64)?;
        out.gauge("members", "Members of the current generation.", None, status.workers.iter().filter(|view| view.member).count() as f64)?;
        out.counter("workers_joined", "Workers that joined.", None, counts.joined)?;
        out.counter("workers_lost", "Workers that were lost.", None, counts.lost)?;
        out.counter("workers_left", "Workers that left as asked.", None, counts.left)?;
        out.counter("generations", "Generations that were formed.", None, counts.formed)?;
        out.counter("generations_aborted", "Generations that a failure broke up.", None, counts.aborted)?;
        out.counter("rollbacks", "Times the job went back behind final steps.", None, counts.rolled_back)?;
        out.counter("checkpoints", "Checkpoints that were stored.", None, counts.checkpoints)?;
        out.counter("checkpoints_failed", "Checkpoints that could not be stored.", None, counts.checkpoints_failed)?;
        if let Some(step) = status.checkpoint_step {
            out.gauge("checkpoint_step", "Step of the newest whole checkpoint.", None, step.0 as f64)?;
        }
        Ok(())
    }

    fn workers(&self, out: &mut Out<'_>) -> fmt::Result {
        let labels = |view: &crate::core::WorkerView| vec![("rank", view.rank.0.to_string()), ("host", view.host.clone())];
        let workers = &self.status.workers;
        out.gauges("worker_step", "Last step a worker applied.", None, workers.iter().map(|view| (labels(view), view.step.0 as f64)))?;
        let silence = workers.iter().map(|view| (labels(view), view.silence.as_secs_f64()));
        out.gauges("worker_silence", "Time since a worker's last word.", Some(Unit::Seconds), silence)?;
        let timed: Vec<_> = workers.iter().filter_map(|view| Some((view, self.history.seen(view)?.timings?))).collect();
        let steps = timed.iter().map(|(view, timings)| (labels(view), timings.total()));
        out.gauges("worker_step_time", "Time of a worker's last step.", Some(Unit::Seconds), steps)?;
        let data = timed.iter().map(|(view, timings)| (labels(view), timings.data.into()));
        out.gauges("worker_data_wait", "Time that a worker waited for data in its last step.", Some(Unit::Seconds), data)?;
        let exchange = timed.iter().map(|(view, timings)| (labels(view), timings.collective.into()));
        out.gauges(
            "worker_exchange",
            "Time of a worker's last step in the all-reduce, with the wait for the others.",
            Some(Unit::Seconds),
            exchange,
        )?;
        let memory: Vec<_> = workers.iter().filter_map(|view| Some((view, self.history.seen(view)?.memory))).collect();
        let held = memory.iter().filter_map(|(view, memory)| Some((labels(view), memory.resident_bytes? as f64)));
        out.gauges("worker_memory", "Memory of the host that a worker's process holds.", Some(Unit::Bytes), held)?;
        let gpus: Vec<_> = memory.iter().filter_map(|(view, memory)| Some((view, memory.gpu?))).collect();
        let used = gpus.iter().map(|(view, gpu)| (labels(view), gpu.used_bytes as f64));
        out.gauges("worker_gpu_memory_used", "Memory in use on a worker's GPU, by whomever.", Some(Unit::Bytes), used)?;
        let total = gpus.iter().map(|(view, gpu)| (labels(view), gpu.total_bytes as f64));
        out.gauges("worker_gpu_memory", "Memory of a worker's GPU.", Some(Unit::Bytes), total)?;
        let starts =
            self.history.workers.iter().map(|(rank, seen)| (vec![("rank", rank.0.to_string())], f64::from(seen.starts.saturating_sub(1))));
        out.counters("worker_restarts", "Workers that joined under a rank after its first.", None, starts)
    }
}

/// Writes families.
struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: f64) -> fmt::Result {
        ConstGauge::new(value).encode(self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?)
    }

    fn gauges(&mut self, name: &str, help: &str, unit: Option<Unit>, series: impl IntoIterator<Item = (Labels, f64)>) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        series.into_iter().try_for_each(|(labels, value)| ConstGauge::new(value).encode(family.encode_family(&labels)?))
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
        ConstCounter::new(value).encode(self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?)
    }

    fn counters(&mut self, name: &str, help: &str, unit: Option<Unit>, series: impl IntoIterator<Item = (Labels, f64)>) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        series.into_iter().try_for_each(|(labels, value)| ConstCounter::new(value).encode(family.encode_family(&labels)?))
    }

    fn histogram(&mut self, name: &str, help: &str, history: &History) -> fmt::Result {
        let seconds = history.step_seconds;
        let bounds = STEP_BOUNDS.into_iter().chain([f64::MAX]);
        let buckets: Vec<(f64, u64)> = bounds.zip(seconds.counts).collect();
        let count = seconds.counts.iter().sum();
        let mut family = self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        family.encode_histogram::<Labels>(seconds.sum, count, &buckets, None)
    }
}
