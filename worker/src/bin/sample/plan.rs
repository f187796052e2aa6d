//! What is drawn, in which order, into which files: all that can be checked without loading a model.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use peapod_model::sample::{SampleOptions, SolverChoice};
use peapod_model::vae::Decoding;
use peapod_proto::program;
use peapod_worker::draw::{Files, InputFiles, Inputs, Precision, Road, Setup, read_latents};
use peapod_worker::grid::Typeface;
use peapod_worker::hub::{self, Watch};
use peapod_worker::numbers::Numbers;
use tch::{Device, Tensor};

use crate::args::{Args, Decode, Thresholds};

/// Share of the steps from a picture that nobody gave a strength for.
const STRENGTH: f64 = 0.8;
/// The same for an inpainting SDXL, as its published pipeline has it: a little less than all, so that the picture shows through.
const INPAINT_STRENGTH: f64 = 0.9999;

/// A prompt, with its English where that was given.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    pub prompt: String,
    pub english: Option<String>,
}

impl Asked {
    /// What is sent down a road. Where only one text was given, it is in the language of the only road there is.
    pub fn text(&self, road: Road) -> &str {
        match road {
            Road::English => self.english.as_deref().unwrap_or(&self.prompt),
            Road::Adapter(_) => &self.prompt,
        }
    }
}

/// A checked command line.
pub struct Plan {
    pub setup: Setup,
    pub options: SampleOptions,
    pub inputs: Inputs,
    /// Noise to begin with, a row a picture.
    pub noise: Option<Tensor>,
    pub asked: Vec<Asked>,
    /// The columns of a sheet; only the first is drawn for separate files.
    pub roads: Vec<Road>,
    /// Their titles.
    pub titles: Vec<String>,
    pub target: Target,
    pub latents_out: Option<PathBuf>,
    /// The CLIP that judges a comparison.
    pub clip: Option<PathBuf>,
    pub settings: String,
}

/// Where pictures go.
pub enum Target {
    Sheet { path: PathBuf, title: String, typeface: Typeface },
    Files(Vec<PathBuf>),
}

impl Plan {
    /// Number of UNet steps of all.
    pub fn num_steps(&self) -> usize {
        let from = if self.inputs.image.is_some() { self.options.first_step(self.inputs.strength) } else { 0 };
        self.asked.len().div_ceil(self.options.batch_size) * self.roads.len() * (self.options.num_steps - from)
    }
}

/// Checks a command line.
pub fn plan(args: Args, device: Device) -> anyhow::Result<Plan> {
    let asked = asked(&args)?;
    ensure!(!asked.is_empty(), "nothing to draw: give --prompt TEXT or --prompts FILE");
    if args.compare {
        let lacking = asked.iter().find(|asked| asked.english.is_none());
        let hint = "give --teacher-prompt with each --prompt, or PROMPT<TAB>ENGLISH lines";
        ensure!(lacking.is_none(), "--compare needs the English of {:?}: {hint}", lacking.map_or("", |asked| &asked.prompt));
    }
    ensure!(args.compare || args.adapters.len() < 2, "several --adapter are for --compare");
    let adapters = (0..args.adapters.len()).map(Road::Adapter);
    let roads: Vec<Road> = match (args.compare, args.adapters.is_empty()) {
        (true, _) => std::iter::once(Road::English).chain(adapters).collect(),
        (false, false) => adapters.collect(),
        (false, true) => vec![Road::English],
    };
    for (option, path) in [("--out", Some(&args.out)), ("--latents-out", args.latents_out.as_ref())] {
        let Some(path) = path else { continue };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        ensure!(folder.is_dir(), "{option} {}: there is no folder {}", path.display(), folder.display());
    }
    let is_png = args.out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
    ensure!(is_png && !args.out.is_dir(), "--out {} must name a .png file", args.out.display());

    let files = Files {
        model: args.model.clone(),
        model_config: args.model_config.clone(),
        adapters: args.adapters.clone(),
        student: args.student.clone(),
        context_length: args.context_length,
        english: roads.contains(&Road::English),
        loras: args.loras.iter().map(|lora| (lora.path.clone(), lora.scale)).collect(),
        control: args.controlnet.clone(),
        precision: Precision { networks: args.dtype.map(Numbers::kind), vae: args.vae_dtype },
    };
    hub::bring(files.names().chain(args.clip.as_deref()), &Say)?;
    for (adapter, encoder) in files.encoders_named_by_adapters() {
        let context = || format!("adapter {} was trained for this encoder; --student says where it is", adapter.display());
        hub::bring([encoder.as_path()], &Say).with_context(context)?;
    }
    let setup = Setup::check(&files)?;
    if let Some(clip) = &args.clip {
        // It is loaded when the pictures are there.
        peapod_model::hub::locate(clip).context("cannot load --clip")?;
    }
    let inputs = inputs(&args, &setup)?;
    let (width, height) = inputs.size().unwrap_or((setup.native_side(), setup.native_side()));
    let mut options = SampleOptions {
        width: args.width.unwrap_or(width),
        height: args.height.unwrap_or(height),
        num_steps: args.steps as usize,
        solver: SolverChoice { scheduler: args.scheduler, spacing: args.spacing.map(Into::into), karras: args.karras },
        guidance: args.guidance,
        guidance_rescale: args.guidance_rescale,
        negative: args.negative.clone(),
        seed: args.seed,
        first_image: 0,
        batch_size: usize::from(args.batch),
        decoding: Decoding::Whole,
    };
    setup.check_options(&options, &inputs)?;
    options.decoding = match args.decode {
        Decode::Auto => setup.decoding(&options, device),
        Decode::Whole => Decoding::Whole,
        Decode::Each => Decoding::OneByOne,
        Decode::Tiles => Decoding::BY_TILES,
    };
    let noise = args.latents.as_deref().map(read_latents).transpose()?;
    if let Some(noise) = &noise {
        let rows = noise.size()[0];
        ensure!(rows >= asked.len() as i64, "{} pictures, but --latents has noise for {rows}", asked.len());
    }

    let titles = titles(&roads, &args.adapters, &setup);
    let settings = settings(&args, &setup, &options, &inputs);
    let target = if args.grid || args.compare {
        let title = args.title.unwrap_or_else(|| match &roads[..] {
            [Road::Adapter(_)] => "Drawn with the adapter".into(),
            [_] => "Drawn by the English teacher".into(),
            [_, _] => "English teacher and adapter, from the same noise".into(),
            _ => "English teacher and adapters, from the same noise".into(),
        });
        Target::Sheet { path: args.out, title, typeface: Typeface::load(args.font.as_deref())? }
    } else {
        Target::Files(numbered(&args.out, asked.len()))
    };
    Ok(Plan { setup, options, inputs, noise, asked, roads, titles, target, latents_out: args.latents_out, clip: args.clip, settings })
}

/// Tells of models that are fetched.
struct Say;

impl Watch for Say {
    fn say(&self, line: &str) {
        program::say(line);
    }
}

/// Reads the pictures that are given as input.
fn inputs(args: &Args, setup: &Setup) -> anyhow::Result<Inputs> {
    let files = InputFiles {
        image: args.init_image.clone(),
        mask: args.mask.clone(),
        control: args.control_image.clone(),
        canny: args.canny.map(|Thresholds(low, high)| (low, high)),
    };
    let usual = match (&args.mask, setup.inpaints() && setup.model().unet_config().addition_embed_type.is_some()) {
        (Some(_), true) => INPAINT_STRENGTH,
        (Some(_), false) => 1.0,
        (None, _) => STRENGTH,
    };
    Ok(Inputs { strength: args.strength.unwrap_or(usual), control_scale: args.control_scale, ..Inputs::read(&files)? })
}

/// What the columns of a sheet are called.
fn titles(roads: &[Road], adapters: &[PathBuf], setup: &Setup) -> Vec<String> {
    let title = |&road: &Road| match road {
        _ if roads.len() == 1 => String::new(),
        Road::English => "English teacher".into(),
        Road::Adapter(_) if adapters.len() == 1 => "Adapter".into(),
        Road::Adapter(index) => setup.adapter_origin(index).map(str::to_owned).or_else(|| name(&adapters[index])).unwrap_or_default(),
    };
    roads.iter().map(title).collect()
}

/// The settings as one line: below a sheet's title, and in each file.
fn settings(args: &Args, setup: &Setup, options: &SampleOptions, inputs: &Inputs) -> String {
    let solver = setup.model().scheduler().solver_with(options.solver);
    let karras = if solver.karras { ", Karras" } else { "" };
    let mut settings = vec![
        format!("{}{karras}, {} steps", solver.scheduler, options.num_steps),
        format!("guidance {}", options.guidance),
        format!("{}x{}", options.width, options.height),
    ];
    if options.guidance_rescale > 0.0 {
        settings.push(format!("rescaled {}", options.guidance_rescale));
    }
    settings.extend(name(&args.model).map(|model| format!("model {model}")));
    if let [adapter] = &args.adapters[..] {
        settings.extend(setup.adapter_origin(0).map(str::to_owned).or_else(|| name(adapter)).map(|adapter| format!("adapter {adapter}")));
    }
    for lora in &args.loras {
        settings.extend(name(&lora.path).map(|path| format!("LoRA {path} x {}", lora.scale)));
    }
    if let Some(image) = args.init_image.as_deref().and_then(name) {
        settings.push(format!("from {image}, strength {}", inputs.strength));
    }
    settings.extend(args.mask.as_deref().and_then(name).map(|mask| format!("mask {mask}")));
    if let Some((control, image)) = args.controlnet.as_deref().and_then(name).zip(args.control_image.as_deref().and_then(name)) {
        settings.push(format!("ControlNet {control} x {} of {image}", inputs.control_scale));
    }
    if !options.negative.is_empty() {
        settings.push(format!("without {}", options.negative));
    }
    settings.join(" · ")
}

fn name(path: &Path) -> Option<String> {
    path.canonicalize().ok().as_deref().unwrap_or(path).file_name().map(|name| name.to_string_lossy().into_owned())
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

#[cfg(test)]
mod tests {
    use clap::Parser;
    use peapod_model::schedule::Scheduler;

    use super::*;

    fn plan_of(arguments: &[&str]) -> anyhow::Result<Plan> {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/model");
        plan(Args::try_parse_from(["sample", "--model", model].iter().chain(arguments))?, Device::Cpu)
    }

    fn refusal(arguments: &[&str]) -> String {
        plan_of(arguments).map(|_| ()).unwrap_err().to_string()
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
        // The demo's configuration was written for Euler.
        assert_eq!(plan.options.solver, SolverChoice::default());
        assert!(plan.settings.starts_with("Euler, 30 steps · guidance 7.5 · 64x64 · model model"), "{}", plan.settings);
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
    fn a_picture_to_start_from_gives_its_size_and_leaves_steps_out() {
        let dir = tempfile::tempdir().unwrap();
        let (image, out) = (dir.path().join("in.png"), dir.path().join("out.png"));
        image::RgbImage::new(96, 64).save(&image).unwrap();
        let arguments =
            ["-p", "x", "-o", out.to_str().unwrap(), "--init-image", image.to_str().unwrap(), "--steps", "10", "--scheduler", "ddim"];
        let plan = plan_of(&arguments).unwrap();
        assert_eq!((plan.options.width, plan.options.height, plan.num_steps()), (96, 64, 8));
        assert_eq!(plan.options.solver.scheduler, Some(Scheduler::Ddim));
        assert!(plan.settings.contains("from in.png, strength 0.8"), "{}", plan.settings);
    }

    #[test]
    fn bad_arguments_are_refused_in_one_clear_line() {
        let refused = |arguments: &[&str]| refusal(&[&["-p", "x", "-o", "out.png"], arguments].concat());
        assert!(refusal(&["-o", "out.png"]).contains("nothing to draw"));
        assert!(refusal(&["-p", "x", "-o", "out.jpg"]).contains("must name a .png"));
        assert!(refusal(&["-p", "x", "-o", "no/such/out.png"]).contains("there is no folder no/such"));
        assert!(refused(&["--width", "70"]).contains("multiples of 8"));
        assert!(refused(&["--height", "-64"]).contains("64x-64 pixels"));
        assert!(refused(&["--steps", "-3"]).contains("-3 is not in"));
        assert!(refused(&["--steps", "1000"]).contains("between 1 and 999"));
        assert!(refused(&["--steps", "51", "--scheduler", "lcm"]).contains("between 1 and 50"));
        assert!(refused(&["--scheduler", "plms"]).contains("known are dpm++, euler"));
        assert!(refused(&["--scheduler", "lcm", "--karras"]).contains("Karras"));
        assert!(refused(&["--guidance", "-1"]).contains("guidance -1"));
        assert!(refused(&["--guidance-rescale", "2"]).contains("guidance rescale 2"));
        assert!(refused(&["--adapter", "none.safetensors"]).contains("the adapter is missing"));
        assert!(refused(&["--adapter", "a", "--adapter", "b"]).contains("for --compare"));
        assert!(refused(&["--lora", "none.safetensors:0.5"]).contains("none.safetensors"));
        assert!(refused(&["--mask", "m.png"]).contains("--init-image"));
        assert!(refused(&["--controlnet", "dir"]).contains("--control-image"));
        assert!(refused(&["--latents", "none.safetensors"]).contains("none.safetensors"));
        assert!(refused(&["--compare"]).contains("--adapter"));
        assert!(refusal(&["-p", "x", "-p", "y", "--teacher-prompt", "z", "-o", "out.png"]).contains("2 --prompt but 1 --teacher-prompt"));
        assert!(refused(&["--compare", "--adapter", "a"]).contains("needs the English of \"x\""));
    }
}
