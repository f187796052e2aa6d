//! Log lines for machines, and the work of two programs told as one.

use peapod_tests::harness::{Cluster, Process};
use serde_json::Value;

/// Each line of a process that is one of its log: JSON, all of them but the summary on standard output.
fn lines_of(process: &Process) -> Vec<Value> {
    process.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The trace that a line is of, and the innermost span.
#[track_caller]
fn trace_of(line: &Value) -> (String, &Value) {
    let spans = line["spans"].as_array().unwrap_or_else(|| panic!("no spans: {line}"));
    let trace = |span: &Value| span["trace_id"].as_str().unwrap_or_else(|| panic!("no trace: {line}")).to_owned();
    assert!(spans.iter().all(|span| trace(span) == trace(&spans[0])), "{line}");
    (trace(&spans[0]), &line["span"])
}

#[track_caller]
fn line_with<'a>(lines: &'a [Value], words: &str) -> &'a Value {
    lines.iter().find(|line| line["message"].as_str().is_some_and(|message| message.contains(words))).unwrap_or_else(|| panic!("{words}"))
}

#[test]
fn lines_of_coordinator_and_worker_for_machines_name_the_session_that_they_are_of() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(2);
    let mut coordinator = cluster.coordinator(1, &["--log-format", "json"]);
    let line: Value = serde_json::from_str(&coordinator.wait_for("listening on http://")).unwrap();
    assert_eq!(line["level"], "INFO");
    let url = line["message"].as_str().unwrap().split_once("listening on ").unwrap().1.to_owned();
    let arguments = ["--coordinator", &url, "--threads", "1", "--log-format", "json"];
    let mut worker = Process::start_with("worker", "worker", &arguments, &[("RUST_LOG", "info,peapod_worker=debug".into())]);
    worker.expect_exit(0);
    coordinator.expect_exit(0);

    let (of_coordinator, of_worker) = (lines_of(&coordinator), lines_of(&worker));
    let (session, span) = trace_of(line_with(&of_coordinator, "rank 0 (pid "));
    assert_eq!((&span["name"], &span["pid"]), (&"session".into(), &worker.id().into()));
    let stored = line_with(&of_worker, "checkpoint of step 2 stored at ");
    let (upload, span) = trace_of(stored);
    assert_eq!((&span["name"], &span["step"], upload), (&"upload".into(), &2.into(), session.clone()));
    assert_eq!(stored["spans"][0]["rank"], 0);
    assert_eq!(trace_of(line_with(&of_worker, "joined as rank 0")).0, session);
    let (upload, span) = trace_of(line_with(&of_coordinator, "checkpoint of step 2 stored"));
    assert_eq!((&span["name"], upload), (&"upload".into(), session));
}

#[test]
fn worker_tells_its_own_log_how_training_goes() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(2);
    let mut coordinator = cluster.coordinator(1, &[]);
    let mut worker = coordinator.worker("worker", &[]);
    worker.expect_exit(0);
    coordinator.expect_exit(0);
    worker.assert_said("tests/demo/model (networks in f32, autoencoder in f32) and tests/demo/model/text_encoder_zh are loaded on cpu");
    worker.assert_said("trains in g000001 as rank 0 from step 0 (world size 1): ");
    worker.assert_said("step 1/2  task ");
}

#[test]
fn machines_read_numbers_as_fields_and_the_last_word_as_a_line_too() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(2).set("validation.shards", vec!["tests/demo/shards/00005.tar"]).set("validation.samples", 4);
    let mut coordinator = cluster.coordinator(1, &["--local", "--log-format", "json"]);
    coordinator.expect_exit(0);
    let lines = lines_of(&coordinator);
    let step = line_with(&lines, "step 1/2  task ");
    assert_eq!((&step["step"], &step["last_step"]), (&1.into(), &2.into()));
    for number in ["total", "task", "logit", "feature", "learning_rate"] {
        assert!(step[number].is_f64(), "{number}: {step}");
    }
    let validation = line_with(&lines, "validation at step 2");
    assert!(validation["step"] == 2 && validation["samples"] == 4 && validation["validation_total"].is_f64(), "{validation}");

    cluster.job.set("train.global_batch", 0);
    let arguments = [cluster.local_arguments(), vec!["--log-format".into(), "json".into()]].concat();
    let mut refused = Process::start("coordinator", "coordinator", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    refused.expect_exit(2);
    let mut worker = Process::start("worker", "worker", &["--coordinator", "nonsense", "--log-format", "json"]);
    worker.expect_exit(2);
    for (process, words) in [(&refused, "coordinator: "), (&worker, "worker: ")] {
        let last: Value = serde_json::from_str(process.lines().last().unwrap()).unwrap();
        assert_eq!(last["level"], "ERROR");
        assert!(last["message"].as_str().unwrap().starts_with(words) && last["timestamp"].is_string(), "{last}");
    }
}

#[test]
fn people_see_no_traces_and_children_speak_to_them() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(1);
    let environment = [("PEAPOD_LOG_FORMAT", "json".to_owned())];
    let mut pretty = cluster.coordinator(1, &["--local"]);
    pretty.expect_exit(0);
    assert!(pretty.lines().iter().all(|line| !line.contains("trace_id")), "{:#?}", pretty.lines());
    // How training goes is told once, by the coordinator.
    let of_workers = pretty.lines_with("[0] ");
    assert!(
        !of_workers.is_empty() && !of_workers.iter().any(|line| line.contains("trains in ") || line.contains(" step 1/1 ")),
        "{of_workers:#?}"
    );

    let mut cluster = Cluster::new();
    cluster.job.set_steps(1);
    let arguments = cluster.local_arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut json = Process::start_with("coordinator", "coordinator", &arguments, &environment);
    json.expect_exit(0);
    let lines = lines_of(&json);
    let child = line_with(&lines, "[0] ");
    assert!(!child["message"].as_str().unwrap().contains('{'), "a worker's line in the coordinator's is not JSON again: {child}");
}
