//! `status --watch`: a job followed to its end.

use std::fmt::Write as _;
use std::io::Write;

use anyhow::Result;
use console::Term;
use peapod_proto::v1;

use super::{connect, said, shown};
use crate::config::Target;
use crate::run::Exit;

/// Shows what the job is doing until it ends, and then how it ended: on a terminal in one place, elsewhere a block with its time for each
/// change, or with `json` an object a line.
///
/// # Errors
/// If no coordinator answers, it is gone without a word of the job's end, or `out` takes no more.
pub async fn watch(target: &Target, json: bool, out: &mut impl Write) -> Result<Exit> {
    let mut replies = connect(target).await?.watch(v1::WatchRequest {}).await.map_err(said)?.into_inner();
    let mut screen = Screen::new(json);
    loop {
        let reply = replies.message().await.map_err(|status| anyhow::anyhow!("the coordinator is gone: {}", said(status)))?;
        let Some(v1::WatchReply { status, end }) = reply else {
            anyhow::bail!("the coordinator is gone, and has not said how the job ended: its log may");
        };
        let status = status.unwrap_or_default();
        screen.show(&status, end.as_ref(), out)?;
        if let Some(end) = end {
            let words = end_in_words(&end, status.final_step);
            if end.outcome() == v1::job_end::Outcome::Failed {
                return Ok(Exit::Failed(words));
            }
            if !json {
                writeln!(out, "{words}")?;
            }
            return Ok(Exit::Finished);
        }
    }
}

fn end_in_words(end: &v1::JobEnd, step: u64) -> String {
    match end.outcome() {
        v1::job_end::Outcome::Finished => format!("the job is finished, at step {step}"),
        v1::job_end::Outcome::Stopped => format!("the job is stopped, at step {step}: {}", end.reason),
        v1::job_end::Outcome::Failed => format!("the job has failed, at step {step}: {}", end.reason),
        v1::job_end::Outcome::Away => format!("the coordinator has stopped alone, at step {step}: the same command goes on with the job"),
        v1::job_end::Outcome::Unspecified => format!("the job is over, at step {step}"),
    }
}

/// Where [`watch`] shows what the job is doing.
struct Screen {
    terminal: Option<Term>,
    json: bool,
    /// What was shown last, without what changes by itself.
    shown: Option<v1::StatusReply>,
}

impl Screen {
    fn new(json: bool) -> Self {
        let terminal = Some(Term::stdout()).filter(|terminal| terminal.is_term() && !json);
        Self { terminal, json, shown: None }
    }

    fn show(&mut self, status: &v1::StatusReply, end: Option<&v1::JobEnd>, out: &mut impl Write) -> Result<()> {
        let steady = steady(status);
        if let Some(terminal) = &self.terminal {
            let (rows, columns) = terminal.size();
            write!(out, "{}", redrawn(&shown::table(status), self.shown.is_none(), rows.into(), columns.into()))?;
        } else if self.shown.as_ref() != Some(&steady) || (end.is_some() && self.json) {
            if self.json {
                let mut object = shown::json(status);
                object["end"] = end.map_or(serde_json::Value::Null, end_json);
                writeln!(out, "{object}")?;
            } else {
                writeln!(out, "{}\n{}", shown::moment(status.unix_s), shown::table(status))?;
            }
        }
        self.shown = Some(steady);
        Ok(out.flush()?)
    }
}

/// A status without what changes though nothing happens.
fn steady(status: &v1::StatusReply) -> v1::StatusReply {
    let workers = status.workers.iter().cloned().map(|worker| v1::WorkerStatus { last_seen_ms: 0, memory: None, ..worker });
    v1::StatusReply { workers: workers.collect(), first_failure_ago_ms: 0, unix_s: 0.0, goodput: None, ..status.clone() }
}

/// What puts a text over the one before on a terminal: line over line, so that it does not flicker. What has no place is left out, since a
/// terminal that scrolls would show every text anew.
fn redrawn(text: &str, is_first: bool, rows: usize, columns: usize) -> String {
    let mut drawn = String::from(if is_first { "\x1b[2J\x1b[H" } else { "\x1b[H" });
    let lines: Vec<&str> = text.lines().collect();
    // The last row is left to what is said at the end.
    let room = rows.saturating_sub(1).max(1);
    let num_shown = if lines.len() > room { room - 1 } else { lines.len() };
    for line in &lines[..num_shown] {
        let _ = writeln!(drawn, "{}\x1b[K", console::truncate_str(line, columns, "…"));
    }
    if num_shown < lines.len() {
        let _ = writeln!(drawn, "… and {} lines more\x1b[K", lines.len() - num_shown);
    }
    drawn + "\x1b[J"
}

fn end_json(end: &v1::JobEnd) -> serde_json::Value {
    let outcome = match end.outcome() {
        v1::job_end::Outcome::Unspecified => "over",
        v1::job_end::Outcome::Finished => "finished",
        v1::job_end::Outcome::Stopped => "stopped",
        v1::job_end::Outcome::Failed => "failed",
        v1::job_end::Outcome::Away => "away",
    };
    serde_json::json!({ "outcome": outcome, "reason": end.reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_is_drawn_over_in_place_and_never_scrolls() {
        assert_eq!(redrawn("one\ntwo", true, 24, 80), "\x1b[2J\x1b[Hone\x1b[K\ntwo\x1b[K\n\x1b[J");
        assert_eq!(redrawn("one\ntwo", false, 24, 80), "\x1b[Hone\x1b[K\ntwo\x1b[K\n\x1b[J");
        assert_eq!(redrawn("1234\n2\n3\n4", false, 4, 3), "\x1b[H12…\x1b[K\n2\x1b[K\n… and 2 lines more\x1b[K\n\x1b[J");
        assert!(redrawn("1\n2\n3", false, 0, 0).lines().count() <= 2, "whatever the terminal says of itself");
    }

    fn shown(json: bool, replies: &[(v1::StatusReply, Option<v1::JobEnd>)]) -> String {
        let mut screen = Screen { terminal: None, json, shown: None };
        let mut out = Vec::new();
        for (status, end) in replies {
            screen.show(status, end.as_ref(), &mut out).unwrap();
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn elsewhere_only_news_is_written_and_the_end_for_machines() {
        let at = |step, unix_s| v1::StatusReply { job_name: "job".into(), final_step: step, unix_s, ..v1::StatusReply::default() };
        let end = v1::JobEnd { outcome: v1::job_end::Outcome::Stopped.into(), reason: "asked".into() };
        let replies = [(at(1, 1.0), None), (at(1, 2.0), None), (at(2, 3.0), None), (at(2, 4.0), Some(end))];
        let text = shown(false, &replies);
        assert_eq!(text.matches("job: ").count(), 2, "{text}");
        assert!(text.starts_with("1970-01-01T00:00:01Z\njob: , step 1\n"), "{text}");
        let lines = shown(true, &replies);
        let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 2]);
        assert!(lines[1]["end"].is_null());
        assert_eq!(lines[2]["end"], serde_json::json!({ "outcome": "stopped", "reason": "asked" }));
    }
}
