//! Log lines: for people or for machines, and spans of work that two programs see.

use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::trace::TARGET;

/// How log lines look, on every command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::Args)]
pub struct LogArgs {
    /// Log lines for people, or JSON, one object a line
    #[arg(
        long,
        global = true,
        env = "PEAPOD_LOG_FORMAT",
        value_enum,
        default_value_t,
        hide_possible_values = true,
        value_name = "pretty|json"
    )]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Pretty,
    /// For machines.
    Json,
}

/// What was asked for when the program started.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// How this program's log lines look.
#[must_use]
pub fn log_format() -> LogFormat {
    FORMAT.get().copied().unwrap_or_default()
}

/// Writes log lines from here on: of level info, unless RUST_LOG says otherwise. `program` is what spans are exported under.
///
/// Lines for machines say of which piece of work they are; to people that says nothing, so they see it with `RUST_LOG=debug` only.
///
/// # Errors
/// If RUST_LOG makes no sense, or spans are to be exported and cannot be.
pub fn start<W>(program: &'static str, args: LogArgs, writer: W) -> Result<(), String>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // A second start would be an error of the program, which the registry finds below.
    let _ = FORMAT.set(args.log_format);
    let spans = super::otlp::layer(program)?;
    let mut filter = filter(std::env::var(EnvFilter::DEFAULT_ENV).ok().as_deref())?;
    if (args.log_format == LogFormat::Json || spans.is_some())
        && let Ok(shown) = format!("{TARGET}=debug").parse()
    {
        filter = filter.add_directive(shown);
    }
    tracing_subscriber::registry().with(filter).with(spans).with(lines(args.log_format, writer)).init();
    Ok(())
}

/// What is logged where `RUST_LOG` has this value.
fn filter(wanted: Option<&str>) -> Result<EnvFilter, String> {
    let wanted = wanted.filter(|wanted| !wanted.is_empty()).unwrap_or("info");
    let words = "give a level such as debug, or TARGET=LEVEL, several with commas between them";
    EnvFilter::try_new(wanted).map_err(|error| format!("RUST_LOG={wanted}: {error}; {words}"))
}

/// Whether lines are coloured: on a terminal, unless the user asks for none (<https://no-color.org>).
fn is_coloured(is_terminal: bool, no_color: Option<&std::ffi::OsStr>) -> bool {
    is_terminal && no_color.is_none_or(std::ffi::OsStr::is_empty)
}

fn lines<S, W>(format: LogFormat, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // A log that nobody reads any more (`| tee` was killed) is no reason to panic, as complaining about it on standard error would be.
    let lines = tracing_subscriber::fmt::layer().with_target(false).log_internal_errors(false).with_writer(writer);
    match format {
        LogFormat::Pretty => lines.with_ansi(is_coloured(io::stderr().is_terminal(), std::env::var_os("NO_COLOR").as_deref())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    }
}

/// A layer of the registry, for those who export.
pub(super) type Above = Box<dyn Layer<tracing_subscriber::layer::Layered<EnvFilter, Registry>> + Send + Sync>;

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn level_that_makes_no_sense_is_refused_by_name() {
        assert_eq!(filter(None).unwrap().to_string(), "info");
        assert_eq!(filter(Some("")).unwrap().to_string(), "info");
        assert_eq!(filter(Some("warn,peapod_worker=debug")).unwrap().to_string(), "peapod_worker=debug,warn");
        let error = filter(Some("peapod=loud")).unwrap_err();
        assert!(error.starts_with("RUST_LOG=peapod=loud: ") && error.contains("give a level such as debug"), "{error}");
    }

    #[test]
    fn who_asks_for_no_colours_gets_none() {
        assert!(is_coloured(true, None) && is_coloured(true, Some("".as_ref())));
        assert!(!is_coloured(true, Some("1".as_ref())) && !is_coloured(false, None));
    }

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is written of a line in a span.
    fn written(format: LogFormat) -> String {
        let kept = Kept::default();
        let writer = kept.clone();
        let subscriber = tracing_subscriber::registry().with(lines(format, move || writer.clone()));
        tracing::subscriber::with_default(subscriber, || {
            let trace = crate::trace::Trace::begin(crate::work_span!("upload", step = 7));
            trace.span().in_scope(|| tracing::info!("stored"));
        });
        String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn line_for_machines_names_the_work_that_it_is_of() {
        let text = written(LogFormat::Json);
        for part in [r#""message":"stored""#, r#""name":"upload""#, r#""step":7"#, r#""trace_id":""#] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(text.lines().count(), 1);
        assert!(written(LogFormat::Pretty).contains("INFO upload{"));
    }

    #[test]
    fn log_that_nobody_reads_is_no_reason_to_panic() {
        struct Gone;
        impl io::Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for format in [LogFormat::Pretty, LogFormat::Json] {
            let subscriber = tracing_subscriber::registry().with(lines(format, || Gone));
            tracing::subscriber::with_default(subscriber, || tracing::info!("lost"));
        }
    }
}
