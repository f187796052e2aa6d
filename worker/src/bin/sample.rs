//! `sample`: draws pictures from prompts, with an adapter in its language or with the model's own encoders in English.

use std::{
    fs,
    io::{IsTerminal, Read},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peapod_model::sample::SampleOptions;
use peapod_worker::{
    draw::{Files, Painter, Road, Setup},
    grid::{Grid, Row, Typeface},
    picture::Picture,
};

/// Draws pictures from prompts.
///
/// With --adapter, prompts are in the adapter's language. Without it they are in English and go through the model's own encoders. With
/// --compare, both are drawn side by side from the same noise.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The model: a folder as diffusers saves it, a checkpoint that is one file, or ORG/NAME of the hub's local cache
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,

    /// For a checkpoint that is one file: a folder whose configurations are taken instead of the published ones
    #[arg(long, value_name = "DIR")]
    model_config: Option<PathBuf>,

    /// The adapter (.safetensors, pytorch_model.bin), or a folder of checkpoints: the newest; without it prompts are English
    #[arg(long, value_name = "PATH")]
    adapter: Option<PathBuf>,

    /// The adapter's text encoder: a folder, or ORG/NAME of the hub's local cache [default: MODEL/text_encoder_zh, else what the adapter names]
    #[arg(long, value_name = "ENCODER", requires = "adapter")]
    student: Option<PathBuf>,

    /// Tokens of a prompt, as in training [default: what the adapter says]
    #[arg(long, value_name = "N", requires = "adapter", value_parser = clap::value_parser!(i64).range(3..=512))]
    context_length: Option<i64>,

    /// What to draw; may be given again for more pictures
    #[arg(short, long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,

    /// Prompts from a file (- for standard input), one a line; the English may stand beside it, behind a tab
    #[arg(long = "prompts", value_name = "FILE")]
    prompts_file: Option<PathBuf>,

    /// The English of each --prompt, in the same order
    #[arg(long = "teacher-prompt", value_name = "TEXT")]
    teacher_prompts: Vec<String>,

    /// Draw every prompt twice in one sheet: in English with the teacher, and with the adapter
    #[arg(long, requires = "adapter")]
    compare: bool,

    /// What the pictures should not show, in the prompts' language
    #[arg(long, value_name = "TEXT", default_value = "")]
    negative: String,

    /// Steps of DPM-Solver++ 2M
    #[arg(long, value_name = "N", default_value_t = 30, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,

    /// How strongly pictures follow their prompt; 1 or less switches guidance off
    #[arg(long, value_name = "X", default_value_t = 7.5, allow_negative_numbers = true)]
    guidance: f64,

    /// Width in pixels [default: the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    width: Option<i64>,

    /// Height in pixels [default: the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    height: Option<i64>,

    /// The pictures' seed; picture N of a seed is the same whatever else is drawn
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Pictures drawn at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,

    /// CPU threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// One sheet of all pictures instead of numbered files
    #[arg(long)]
    grid: bool,

    /// The line above a sheet [default: what is compared]
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,

    /// A font (.ttf, .otf, .ttc) for captions that the built-in one lacks characters for
    #[arg(long, value_name = "FILE")]
    font: Option<PathBuf>,

    /// Where to write; several pictures become out-000.png, out-001.png, ...
    #[arg(short, long, value_name = "PNG")]
    out: PathBuf,
}

/// A prompt, with its English where that was given.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    prompt: String,
    english: Option<String>,
}

/// What is drawn, in which order, into which files: all checked.
struct Plan {
    setup: Setup,
    options: SampleOptions,
    asked: Vec<Asked>,
    /// The columns of a sheet; only the first is drawn for separate files.
    roads: Vec<Road>,
    target: Target,
    settings: String,
}

/// Where pictures go.
enum Target {
    Sheet { path: PathBuf, title: String, typeface: Typeface },
    Files(Vec<PathBuf>),
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Before the first tensor: libtorch sizes its pools once.
    let threads = args.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get() as i32), i32::from);
    tch::set_num_threads(threads);
    tch::set_num_interop_threads(1);
    let plan = match plan(args) {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("sample: {error:#}");
            return ExitCode::from(2);
        }
    };
    match run(&plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sample: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Checks everything that can be checked without loading a model.
fn plan(args: Args) -> anyhow::Result<Plan> {
    let asked = asked(&args)?;
    ensure!(!asked.is_empty(), "nothing to draw: give --prompt TEXT or --prompts FILE");
    if args.compare {
        let lacking = asked.iter().find(|asked| asked.english.is_none());
        let hint = "give --teacher-prompt with each --prompt, or PROMPT<TAB>ENGLISH lines";
        ensure!(lacking.is_none(), "--compare needs the English of {:?}: {hint}", lacking.map_or("", |asked| &asked.prompt));
    }
    let roads = match (args.compare, &args.adapter) {
        (true, _) => vec![Road::English, Road::Adapter],
        (false, Some(_)) => vec![Road::Adapter],
        (false, None) => vec![Road::English],
    };
    let is_png = args.out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
    ensure!(is_png && !args.out.is_dir(), "--out {} must name a .png file", args.out.display());
    let folder = args.out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "--out {}: there is no folder {}", args.out.display(), folder.display());

    let setup = Setup::check(&Files {
        model: args.model.clone(),
        model_config: args.model_config,
        adapter: args.adapter.clone(),
        student: args.student,
        context_length: args.context_length,
        english: roads.contains(&Road::English),
    })?;
    let options = SampleOptions {
        width: args.width.unwrap_or(setup.native_side()),
        height: args.height.unwrap_or(setup.native_side()),
        num_steps: args.steps as usize,
        guidance: args.guidance,
        negative: args.negative,
        seed: args.seed,
        batch_size: usize::from(args.batch),
        ..SampleOptions::default()
    };
    setup.check_options(&options)?;

    let target = if args.grid || args.compare {
        let title = args.title.unwrap_or_else(|| match &roads[..] {
            [_, _] => "English teacher and adapter, from the same noise".into(),
            [Road::Adapter] => "Drawn with the adapter".into(),
            _ => "Drawn by the English teacher".into(),
        });
        Target::Sheet { path: args.out, title, typeface: Typeface::load(args.font.as_deref())? }
    } else {
        Target::Files(numbered(&args.out, asked.len()))
    };
    let name =
        |path: &Path| path.canonicalize().ok().as_deref().unwrap_or(path).file_name().map(|name| name.to_string_lossy().into_owned());
    let mut settings = vec![
        format!("DPM-Solver++ 2M, {} steps", options.num_steps),
        format!("guidance {}", options.guidance),
        format!("{}x{}", options.width, options.height),
    ];
    settings.extend(name(&args.model).map(|model| format!("model {model}")));
    let adapter = setup.adapter_origin().map(str::to_owned).or_else(|| args.adapter.as_deref().and_then(name));
    settings.extend(adapter.map(|adapter| format!("adapter {adapter}")));
    if !options.negative.is_empty() {
        settings.push(format!("without {}", options.negative));
    }
    Ok(Plan { setup, options, asked, roads, target, settings: settings.join(" · ") })
}

/// Collects the prompts of the command line, then those of the file.
fn asked(args: &Args) -> anyhow::Result<Vec<Asked>> {
    let (given, english) = (args.prompts.len(), args.teacher_prompts.len());
    ensure!(english == 0 || english == given, "{given} --prompt but {english} --teacher-prompt: give as many of either");
    let mut teacher = args.teacher_prompts.iter().cloned();
    let mut asked: Vec<_> = args.prompts.iter().map(|prompt| Asked { prompt: prompt.clone(), english: teacher.next() }).collect();
    if let Some(path) = &args.prompts_file {
        let text = if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read prompts from standard input")?;
            text
        } else {
            fs::read_to_string(path).with_context(|| format!("cannot read prompts from {}", path.display()))?
        };
        asked.extend(parse_lines(&text).with_context(|| path.display().to_string())?);
    }
    Ok(asked)
}

/// Reads one prompt a line, with its English behind a tab; empty lines are skipped.
fn parse_lines(text: &str) -> anyhow::Result<Vec<Asked>> {
    let text = text.trim_start_matches('\u{FEFF}');
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(number, line): (usize, &str)| {
        let fields: Vec<_> = line.split('\t').map(str::trim).collect();
        let (prompt, english) = match fields[..] {
            [prompt] => (prompt, None),
            [prompt, english] if !prompt.is_empty() && !english.is_empty() => (prompt, Some(english.to_owned())),
            _ => anyhow::bail!("line {} must be PROMPT or PROMPT<TAB>ENGLISH", number + 1),
        };
        Ok(Asked { prompt: prompt.to_owned(), english })
    };
    lines.map(parse).collect()
}

/// `out.png` for one picture; `out-000.png`, `out-001.png`, ... for more.
fn numbered(out: &Path, count: usize) -> Vec<PathBuf> {
    if count == 1 {
        return vec![out.to_owned()];
    }
    let digits = count.saturating_sub(1).to_string().len().max(3);
    let stem = out.file_stem().unwrap_or_default().to_string_lossy();
    (0..count).map(|i| out.with_file_name(format!("{stem}-{i:0digits$}.png"))).collect()
}

impl Asked {
    /// What is sent down a road. Where only one text was given, it is in the language of the only road there is.
    fn text(&self, road: Road) -> &str {
        match road {
            Road::English => self.english.as_deref().unwrap_or(&self.prompt),
            Road::Adapter => &self.prompt,
        }
    }
}

/// Loads the models, draws, and writes the files.
fn run(plan: &Plan) -> anyhow::Result<()> {
    let started = std::time::Instant::now();
    let reporter = Reporter::new(plan);
    let painter = plan.setup.load().context("cannot load the models")?;
    reporter.say(format!("models loaded in {:.1} s", started.elapsed().as_secs_f64()));
    let seed = plan.options.seed.to_string();
    match &plan.target {
        Target::Files(paths) => {
            draw(plan, &painter, &reporter, |index, pictures| {
                let settings = format!("{} · picture {index}", plan.settings);
                let prompt = plan.asked[index].text(plan.roads[0]);
                write(&pictures[0], &paths[index], &[("prompt", prompt), ("seed", &seed), ("settings", &settings)])?;
                reporter.say(format!("wrote {}", paths[index].display()));
                Ok(())
            })?;
        }
        Target::Sheet { path, title, typeface } => {
            let mut rows = Vec::new();
            draw(plan, &painter, &reporter, |index, pictures| {
                let Asked { prompt, english } = &plan.asked[index];
                rows.push(Row { captions: std::iter::once(prompt).chain(english).cloned().collect(), pictures });
                Ok(())
            })?;
            let columns = match &plan.roads[..] {
                [_] => vec![String::new()],
                roads => roads.iter().map(|road| title_of(*road).into()).collect(),
            };
            let subtitle = format!("{} · seed {seed}", plan.settings);
            let sheet = Grid { title: title.clone(), subtitle, columns, rows }.compose(typeface)?;
            let line = |asked: &Asked| plan.roads.iter().rev().map(|&road| asked.text(road)).collect::<Vec<_>>().join("\t");
            let prompts = plan.asked.iter().map(line).collect::<Vec<_>>().join("\n");
            write(&sheet, path, &[("prompt", &prompts), ("seed", &seed), ("settings", &plan.settings)])?;
            reporter.say(format!("wrote {}", path.display()));
        }
    }
    reporter.finish();
    Ok(())
}

/// The title of a road's column.
fn title_of(road: Road) -> &'static str {
    match road {
        Road::English => "English teacher",
        Road::Adapter => "Adapter",
    }
}

fn write(picture: &Picture, path: &Path, texts: &[(&str, &str)]) -> anyhow::Result<()> {
    let texts: Vec<_> = texts.iter().copied().chain([("Software", concat!("peapod sample ", env!("CARGO_PKG_VERSION")))]).collect();
    Ok(picture.write_png(path, &texts)?)
}

/// Draws all prompts, batch by batch, and hands over each prompt's pictures, one a road, as soon as they are there.
fn draw(
    plan: &Plan,
    painter: &Painter,
    reporter: &Reporter,
    mut deliver: impl FnMut(usize, Vec<Picture>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let batch_size = plan.options.batch_size;
    for (batch, asked) in plan.asked.chunks(batch_size).enumerate() {
        let first = batch * batch_size;
        let options = SampleOptions { first_image: first as u64, ..plan.options.clone() };
        let mut columns = Vec::new();
        for &road in &plan.roads {
            let prompts: Vec<_> = asked.iter().map(|asked| asked.text(road)).collect();
            let pictures = painter.draw(road, &prompts, &options, |_| reporter.step());
            columns.push(pictures.with_context(|| format!("cannot draw {:?}", prompts[0]))?.into_iter());
        }
        for index in first..first + asked.len() {
            deliver(index, columns.iter_mut().filter_map(Iterator::next).collect())?;
        }
        reporter.drew(first + asked.len(), plan.asked.len());
    }
    Ok(())
}

/// Tells how far it is: a bar on a terminal, a line a batch elsewhere; on standard error, so that nothing mixes with data.
struct Reporter {
    bar: ProgressBar,
    terminal: bool,
}

impl Reporter {
    fn new(plan: &Plan) -> Self {
        let num_steps = plan.asked.len().div_ceil(plan.options.batch_size) * plan.roads.len() * plan.options.num_steps;
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(num_steps as u64), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:32} step {pos} of {len}, {eta} left") {
            bar.set_style(style);
        }
        Self { bar, terminal }
    }

    fn say(&self, line: String) {
        if self.terminal {
            self.bar.println(line);
        } else {
            eprintln!("{line}");
        }
    }

    fn step(&self) {
        self.bar.inc(1);
    }

    fn drew(&self, done: usize, all: usize) {
        if !self.terminal && all > 1 {
            eprintln!("drew {done} of {all} prompts");
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn plan_of(arguments: &[&str]) -> anyhow::Result<Plan> {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/model");
        plan(Args::try_parse_from(["sample", "--model", model].iter().chain(arguments))?)
    }

    fn refusal(arguments: &[&str]) -> String {
        plan_of(arguments).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn arguments_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn one_prompt_gives_one_file_and_several_are_numbered() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out.png");
        assert_eq!(numbered(&out, 1), std::slice::from_ref(&out));
        assert_eq!(numbered(&out, 2), [dir.path().join("out-000.png"), dir.path().join("out-001.png")]);
        assert_eq!(numbered(&out, 1001)[1000], dir.path().join("out-1000.png"));
        let plan = plan_of(&["-p", "a red circle", "-o", out.to_str().unwrap()]).unwrap();
        assert_eq!((plan.options.width, plan.options.height, plan.options.num_steps), (64, 64, 30));
    }

    #[test]
    fn prompt_files_may_carry_the_english_behind_a_tab() {
        let asked = parse_lines("\u{FEFF}红色的圆形\ta red circle\r\n\n 蓝色 \n").unwrap();
        assert_eq!(asked[0], Asked { prompt: "红色的圆形".into(), english: Some("a red circle".into()) });
        assert_eq!(asked[1], Asked { prompt: "蓝色".into(), english: None });
        assert!(parse_lines("a\nb\tc\td").unwrap_err().to_string().starts_with("line 2"));
        assert!(parse_lines("\tb").is_err());
    }

    #[test]
    fn bad_arguments_are_refused_in_one_clear_line() {
        assert!(refusal(&["-o", "out.png"]).contains("nothing to draw"));
        assert!(refusal(&["-p", "x", "-o", "out.jpg"]).contains("must name a .png"));
        assert!(refusal(&["-p", "x", "-o", "no/such/out.png"]).contains("there is no folder no/such"));
        assert!(refusal(&["-p", "x", "-o", "out.png", "--width", "70"]).contains("multiples of 32"));
        assert!(refusal(&["-p", "x", "-o", "out.png", "--height", "-64"]).contains("64x-64 pixels"));
        assert!(refusal(&["-p", "x", "-o", "out.png", "--steps", "-3"]).contains("-3 is not in"));
        assert!(refusal(&["-p", "x", "-o", "out.png", "--steps", "1000"]).contains("between 1 and 999"));
        assert!(refusal(&["-p", "x", "-o", "out.png", "--guidance", "-1"]).contains("guidance -1"));
        assert!(refusal(&["-p", "x", "-o", "out.png", "--adapter", "none.safetensors"]).contains("the adapter is missing"));
        assert!(refusal(&["-p", "x", "-o", "out.png", "--compare"]).contains("--adapter"));
        assert!(refusal(&["-p", "x", "-p", "y", "--teacher-prompt", "z", "-o", "out.png"]).contains("2 --prompt but 1 --teacher-prompt"));
        assert!(refusal(&["-p", "x", "-o", "out.png", "--compare", "--adapter", "a"]).contains("needs the English of \"x\""));
    }
}
