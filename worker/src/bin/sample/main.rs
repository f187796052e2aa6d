//! `sample`: draws pictures from prompts, with an adapter in its language or with the model's own encoders in English.

mod args;
mod compare;
mod plan;
mod report;

use std::collections::HashSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Subcommand};
use peapod_model::sample::SampleOptions;
use peapod_model::text::Overlooked;
use peapod_proto::program::{Pages, nobody_reads, say};
use peapod_worker::device;
use peapod_worker::draw::{Painter, Road, write_latents};
use peapod_worker::grid::{Grid, Row};
use peapod_worker::picture::Picture;
use tch::{Device, Tensor};

use self::args::Args;
use self::plan::{Asked, Plan, Target, plan};
use self::report::Reporter;

fn main() -> ExitCode {
    // What draws needs a model; what every program has does not.
    let described = Args::command();
    let (about, long_about) = (described.get_about().cloned(), described.get_long_about().cloned());
    let commands = Pages::augment_subcommands(described).subcommand_negates_reqs(true).args_conflicts_with_subcommands(true);
    // The subcommands bring a description of their own.
    let commands = commands.about(about.unwrap_or_default()).long_about(long_about.unwrap_or_default());
    let matches = commands.clone().get_matches();
    if let Ok(pages) = Pages::from_arg_matches(&matches) {
        return match pages.answer(commands) {
            Err(error) if !nobody_reads(&error) => fail(&error.into(), 1),
            _ => ExitCode::SUCCESS,
        };
    }
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let device = match device::open(args.device, device::Sharing::Ignored) {
        Ok(device) => device,
        Err(problem) => return fail(&anyhow::anyhow!(problem), 2),
    };
    args.kernels.settle(device);
    // Before the first tensor: libtorch sizes its pools once.
    let threads = args.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get() as i32), i32::from);
    tch::set_num_threads(threads);
    tch::set_num_interop_threads(1);
    let plan = match plan(args, device) {
        Ok(plan) => plan,
        Err(error) => return fail(&error, 2),
    };
    match run(&plan, device) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    say(format_args!("sample: {error:#}"));
    ExitCode::from(code)
}

/// Loads the models, draws, and writes the files.
fn run(plan: &Plan, device: Device) -> anyhow::Result<()> {
    let started = Instant::now();
    let reporter = Reporter::new(plan.num_steps());
    let painter = Painter::load(&plan.setup, device).context("cannot load the models")?;
    reporter.say(format!("models loaded in {:.1} s", started.elapsed().as_secs_f64()));
    for file in plan.setup.averages() {
        reporter.say(format!("adapter: the job's moving average, {}", file.display()));
    }
    for line in unseen(plan, &painter)? {
        reporter.say(line);
    }
    let seed = plan.options.seed.to_string();
    let took = match &plan.target {
        Target::Files(paths) => draw(plan, &painter, &reporter, |index, pictures| {
            let settings = format!("{} · picture {index}", plan.settings);
            let prompt = plan.asked[index].text(plan.roads[0]);
            write(&pictures[0], &paths[index], &[("prompt", prompt), ("seed", &seed), ("settings", &settings)])?;
            reporter.say(format!("wrote {}", paths[index].display()));
            Ok(())
        })?,
        Target::Sheet { path, title, typeface } => {
            let mut rows = Vec::new();
            let took = draw(plan, &painter, &reporter, |index, pictures| {
                let Asked { prompt, english } = &plan.asked[index];
                rows.push(Row { captions: std::iter::once(prompt).chain(english).cloned().collect(), pictures });
                Ok(())
            })?;
            let subtitle = format!("{} · seed {seed}", plan.settings);
            let sheet = Grid { title: title.clone(), subtitle, columns: plan.titles.clone(), rows };
            if let Some(line) = typeface.complaint(sheet.texts()) {
                reporter.say(format!("sample: {line}"));
            }
            let picture = sheet.compose(typeface)?;
            let lines: Vec<&Road> = match &plan.roads[..] {
                [english, adapter, ..] => vec![adapter, english],
                roads => roads.iter().collect(),
            };
            let line = |asked: &Asked| lines.iter().map(|&&road| asked.text(road)).collect::<Vec<_>>().join("\t");
            let prompts = plan.asked.iter().map(line).collect::<Vec<_>>().join("\n");
            write(&picture, path, &[("prompt", &prompts), ("seed", &seed), ("settings", &plan.settings)])?;
            reporter.say(format!("wrote {}", path.display()));
            if plan.roads.len() > 1 {
                compare::print(plan, &sheet.rows, device)?;
            }
            took
        }
    };
    reporter.finish(plan.asked.len() * plan.roads.len(), took);
    Ok(())
}

/// What of the prompts no encoder sees, a line for each text and what is wrong with it.
fn unseen(plan: &Plan, painter: &Painter) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for &road in &plan.roads {
        // In a comparison what is left out is said in the adapter's language alone.
        let negative = if road == Road::English && plan.roads.len() > 1 { "" } else { plan.options.negative.as_str() };
        for text in plan.asked.iter().map(|asked| asked.text(road)).chain([negative]) {
            let (Overlooked { cut_off, is_unknown }, num_tokens) = painter.overlooked(road, text)?;
            if !cut_off.is_empty() {
                lines.push(format!(
                    "sample: {text:?} is longer than the {num_tokens} tokens that the text encoder takes; cut off: {cut_off:?}"
                ));
            }
            if is_unknown {
                lines.push(format!("sample: {text:?} has no word or character that the text encoder knows: is it in its language?"));
            }
        }
    }
    // Several columns may have the same encoder.
    let mut said = HashSet::new();
    lines.retain(|line| said.insert(line.clone()));
    Ok(lines)
}

fn write(picture: &Picture, path: &Path, texts: &[(&str, &str)]) -> anyhow::Result<()> {
    let texts: Vec<_> = texts.iter().copied().chain([("Software", concat!("peapod sample ", env!("CARGO_PKG_VERSION")))]).collect();
    Ok(picture.write_png(path, &texts)?)
}

/// Draws all prompts, batch by batch, and hands over each prompt's pictures, one a road, as soon as they are there. Returns how long the
/// models were at work.
fn draw(
    plan: &Plan,
    painter: &Painter,
    reporter: &Reporter,
    mut deliver: impl FnMut(usize, Vec<Picture>) -> anyhow::Result<()>,
) -> anyhow::Result<Duration> {
    let started = Instant::now();
    let batch_size = plan.options.batch_size;
    let task =
        painter.task(&plan.inputs, &plan.options, plan.noise.as_ref().map(Tensor::shallow_clone)).context("cannot prepare the pictures")?;
    let mut took = started.elapsed();
    let (mut initial, mut clean) = (Vec::new(), Vec::new());
    for (batch, asked) in plan.asked.chunks(batch_size).enumerate() {
        let first = batch * batch_size;
        let mut columns = Vec::new();
        for &road in &plan.roads {
            let prompts: Vec<_> = asked.iter().map(|asked| asked.text(road)).collect();
            let mut options = SampleOptions { first_image: first as u64, ..plan.options.clone() };
            if road == Road::English && plan.roads.len() > 1 {
                // What is left out is said in the adapter's language.
                options.negative.clear();
            }
            let started = Instant::now();
            let drawing = painter.draw(road, &prompts, &options, &task, &mut |_| reporter.step());
            let drawing = drawing.with_context(|| format!("cannot draw {:?}", prompts[0]))?;
            took += started.elapsed();
            if Some(&road) == plan.roads.last() {
                initial.push(drawing.initial);
                clean.push(drawing.latents);
            }
            columns.push(drawing.pictures.into_iter());
        }
        for index in first..first + asked.len() {
            deliver(index, columns.iter_mut().filter_map(Iterator::next).collect())?;
        }
        reporter.drew(first + asked.len(), plan.asked.len());
    }
    if let Some(path) = &plan.latents_out {
        write_latents(path, &initial, &clean)?;
        reporter.say(format!("wrote {}", path.display()));
    }
    Ok(took)
}
