//! What people and machines see of a job over HTTP: its page, metrics, health, event files, and the commands.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use peapod_tests::harness::{Cluster, Coordinator, Signal, poll, workspace};
use serde_json::Value;

/// A job that goes on until it is stopped.
fn long() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(4000);
    cluster
}

/// Where the page is.
fn page_of(coordinator: &Coordinator) -> String {
    let line = coordinator.wait_for("live page and metrics on http://");
    line.split_once("http://").unwrap().1.trim_end_matches('/').to_owned()
}

/// Status, headers and body of an answer.
fn get(address: &str, path: &str) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head, bytes.split_off(end + 4))
}

fn state(address: &str) -> Value {
    let (status, head, body) = get(address, "/api/state/0/0");
    assert_eq!(status, 200, "{head}");
    serde_json::from_slice(&body).unwrap()
}

fn metrics(address: &str) -> String {
    let (status, head, body) = get(address, "/metrics");
    assert!(status == 200 && head.contains("application/openmetrics-text"), "{head}");
    String::from_utf8(body).unwrap()
}

#[test]
fn killed_worker_shows_as_such_within_the_heartbeat_timeout_and_waiting_is_no_illness() {
    let cluster = long();
    let mut coordinator = cluster.coordinator(2, &[]);
    let page = page_of(&coordinator);
    let is_well = || assert!(["/healthz", "/readyz"].iter().all(|path| get(&page, path).0 == 200));
    is_well();
    let before = state(&page);
    assert_eq!(
        (&before["state"], &before["first_failure"], &before["ended_unix_s"]),
        (&"waiting for ranks 0-1".into(), &Value::Null, &Value::Null)
    );
    let mut survivor = coordinator.worker_of_rank(0);
    let mut victim = coordinator.worker_of_rank(1);
    coordinator.wait_for_step(3);
    coordinator.allow_error(" lost at step ");
    victim.signal(Signal::KILL);
    let killed = Instant::now();
    let seen = poll("rank 1 to be shown as lost", || {
        let worker = state(&page)["workers"][1].clone();
        (worker["phase"] == "lost").then_some(worker)
    });
    assert!(killed.elapsed() < Duration::from_secs(3), "{:?}", killed.elapsed());
    assert!(seen["why"].as_str().unwrap().contains("connection broke"), "{seen}");
    assert!(seen["step_s"].as_f64().unwrap() > 0.0, "it still says how fast it was: {seen}");
    assert!(seen["memory_bytes"].is_null(), "it holds nothing any more: {seen}");
    let state_then = state(&page);
    let failure = &state_then["first_failure"];
    assert!(failure["text"].as_str().unwrap().starts_with("rank 1 (pid ") && failure["healed_step"].is_null(), "{failure}");
    let at = failure["unix_s"].as_f64().unwrap();
    assert!((at - state_then["unix_s"].as_f64().unwrap()).abs() < 5.0 && at > state_then["started_unix_s"].as_f64().unwrap(), "{failure}");
    let mut status = coordinator.control(&["status"]);
    status.expect_exit(0);
    status.assert_said("first failure, ");
    victim.wait();
    is_well();

    let mut replacement = coordinator.worker_of_rank(1);
    let now = poll("rank 1 to train again", || {
        let state = state(&page);
        let worker = &state["workers"][1];
        (worker["restarts"] == 1 && worker["member"] == true && worker["step"].as_u64() >= state["step"].as_u64()).then_some(state)
    });
    assert_eq!((&now["counts"]["lost"], &now["counts"]["aborted"]), (&1.into(), &1.into()));
    assert!(now["workers"][0]["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{}", now["workers"][0]);
    assert_eq!(now["first_failure"]["text"], failure["text"]);
    let healed = now["first_failure"]["healed_step"].as_u64().unwrap();
    let mut status = coordinator.control(&["status"]);
    status.expect_exit(0);
    status.assert_said(&format!("healed at step {healed}, a failure "));
    assert!(
        now["events"]
            .as_array()
            .unwrap()
            .iter()
            .any(|event| event["level"] == "error" && event["text"].as_str().unwrap().contains("lost at step"))
    );
    // Every second since the start has one cause, the wait for rank 1 among them.
    let causes: BTreeMap<&str, f64> = now["goodput"]["seconds"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["cause"].as_str().unwrap(), one["seconds"].as_f64().unwrap()))
        .collect();
    let wall = now["unix_s"].as_f64().unwrap() - now["started_unix_s"].as_f64().unwrap();
    assert!((causes.values().sum::<f64>() - wall).abs() < 0.1, "{causes:?}, {wall}");
    assert!(causes["waiting_for_workers"] > 0.0 && causes["final_steps"] > 0.0, "{causes:?}");

    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
    survivor.expect_exit(0);
    replacement.expect_exit(0);
}

#[test]
fn page_needs_nothing_from_outside_and_gives_nothing_away() {
    let cluster = long();
    std::fs::create_dir_all(cluster.state_dir().join("pictures/step-000000001")).unwrap();
    std::fs::write(cluster.state_dir().join("secret.json"), "secret").unwrap();
    std::fs::write(cluster.state_dir().join("pictures/step-000000001/00.png"), "picture").unwrap();
    let mut coordinator = cluster.coordinator(2, &[]);
    let page = page_of(&coordinator);
    let (status, head, body) = get(&page, "/");
    let html = String::from_utf8(body).unwrap();
    assert!(status == 200 && head.contains("default-src 'self'"), "{head}");
    for file in html.split(['"']).filter(|part| part.ends_with(".js") || part.ends_with(".css")) {
        assert!(file.starts_with('/') && get(&page, file).0 == 200, "{file}");
    }
    assert!(!html.contains("http://") && !html.contains("https://") && !html.contains(" style="), "{html}");
    assert_eq!(get(&page, "/pictures/step-000000001/00.png").2, b"picture");
    for path in [
        "/pictures/..%2f/secret.json",
        "/pictures/step-000000001/..%2f..%2fsecret.json",
        "/pictures/../secret.json",
        "/secret.json",
        "/pictures/step-1/x.png",
    ] {
        assert_eq!(get(&page, path).0, 404, "{path}");
    }
    coordinator.signal(Signal::INT);
    coordinator.expect_exit(130);
}

/// Samples of a scrape by family, after what promtool looks for: one HELP and TYPE each and before the samples, suffixes by type, base
/// units, every series once, numbers.
fn lint(text: &str) -> BTreeMap<String, Vec<String>> {
    let (mut types, mut helps, mut series) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
    let mut families: BTreeMap<String, Vec<String>> = BTreeMap::new();
    assert!(text.ends_with("# EOF\n"), "{text}");
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").map(|rest| rest.split_once(' ').unwrap()) {
            assert!(helps.insert(name.to_owned()) && help.ends_with('.'), "{line}");
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").map(|rest| rest.split_once(' ').unwrap()) {
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none() && helps.contains(name), "{line}");
            if kind == "gauge" {
                // Its samples have its name; those of a GPU are there where one is.
                families.insert(name.to_owned(), vec![name.to_owned()]);
            }
        } else if !line.starts_with('#') {
            let (key, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
            assert!(series.insert(key.to_owned()), "twice: {line}");
            let name = key.split('{').next().unwrap();
            let family = types.keys().find(|family| {
                let suffix = name.strip_prefix(family.as_str());
                match types[*family].as_str() {
                    "counter" => suffix == Some("_total"),
                    "histogram" => matches!(suffix, Some("_sum" | "_count" | "_bucket")),
                    _ => suffix == Some(""),
                }
            });
            let family = family.unwrap_or_else(|| panic!("no TYPE, or a wrong suffix: {line}")).clone();
            assert!(name.starts_with("peapod_") && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
            assert!(
                !["_ms", "_millis", "_minutes", "_hours", "_percent", "_kb", "_mb", "_gauge", "_counter"]
                    .iter()
                    .any(|unit| family.ends_with(unit)),
                "{line}"
            );
            families.entry(family).or_default().push(name.to_owned());
        }
    }
    for (family, kind) in &types {
        assert!(!(kind != "counter" && family.ends_with("_total")), "{family} is a {kind}");
    }
    families
}

/// The names of metrics in a query.
fn names_in(query: &str) -> BTreeSet<String> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("peapod_")).map(str::to_owned).collect()
}

#[test]
fn metrics_keep_the_conventions_and_every_query_of_the_dashboard_names_one() {
    let mut cluster = long();
    cluster.job.set("data.shards", vec!["tests/demo/shards/{00000..00004}.tar"]);
    cluster.job.set("validation.shards", vec!["tests/demo/shards/00005.tar"]);
    cluster.job.set("validation.samples", 4).set("validation.every_steps", 2).set("checkpoint.every_steps", 2);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    let page = page_of(&coordinator);
    lint(&metrics(&page));
    coordinator.wait_for("checkpoint of step ");
    coordinator.wait_for_step(4);
    let text = metrics(&page);
    let families = lint(&text);
    let value = |key: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("{key} in {text}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    };
    assert!(value("peapod_final_step ") >= 4.0 && value("peapod_members ") == 2.0);
    assert_eq!(value("peapod_step_samples_total "), value("peapod_ledger_samples{source=\"\",outcome=\"trained\"}"));
    assert!(value("peapod_goodput_ratio ") > 0.0 && value("peapod_goodput_ratio ") <= 1.0);
    assert!(value("peapod_worker_step_time_seconds{rank=\"1\"") > 0.0);
    assert!(value("peapod_worker_memory_bytes{rank=\"1\"") > 1e6);

    let served: BTreeSet<&String> = families.values().flatten().collect();
    let dashboard = std::fs::read_to_string(workspace().join("deploy/grafana/peapod.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let mut queries: Vec<&str> = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        queries.extend(panel["targets"].as_array().unwrap().iter().map(|target| target["expr"].as_str().unwrap()));
    }
    queries.extend(dashboard["templating"]["list"].as_array().unwrap().iter().filter_map(|variable| variable["query"]["query"].as_str()));
    assert!(queries.len() > 20);
    let rules = std::fs::read_to_string(workspace().join("deploy/kubernetes/components/prometheus/rules.yaml")).unwrap();
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(alerts.len() > 5);
    queries.extend(alerts);
    for query in queries {
        let names = names_in(query);
        assert!(!names.is_empty() && names.iter().all(|name| served.contains(name)), "{query}: {names:?}");
    }
    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
}

#[test]
fn curves_outlive_the_coordinator_and_its_checkpoints_are_listed() {
    let mut cluster = Cluster::new();
    cluster.job.set("pictures.prompts", vec!["红色的圆形".to_owned()]).set("pictures.every_steps", 2).set("pictures.steps", 2);
    cluster.job.set_steps(4);
    cluster.coordinator(2, &["--local"]).expect_exit(0);
    cluster.job.set_steps(6);
    let mut coordinator = cluster.coordinator(2, &[]);
    let state = state(&page_of(&coordinator));
    assert_eq!(state["series"]["step"], serde_json::json!([1, 2, 3, 4]));
    assert!(
        state["series"]["samples_per_s"][0].is_null() && state["series"]["samples_per_s"][3].as_f64().unwrap() > 0.0,
        "{}",
        state["series"]
    );
    assert!(state["series"]["task"][3].as_f64().is_some() && state["known_since_step"].is_null());
    assert_eq!(state["pictures"], serde_json::json!(["step-000000000", "step-000000002", "step-000000004"]));
    coordinator.signal(Signal::INT);
    coordinator.expect_exit(130);
    // A file a start; the first holds the steps and the pictures.
    let files = std::fs::read_dir(cluster.state_dir().join("tensorboard")).unwrap();
    let sizes: Vec<u64> = files.map(|file| file.unwrap().metadata().unwrap().len()).collect();
    assert!(sizes.len() == 2 && sizes.iter().any(|&size| size > 1000), "{sizes:?}");

    let store = cluster.state_dir().join("checkpoints");
    let mut list = coordinator_command(&["checkpoints", "list", "--json", "--checkpoints", store.to_str().unwrap()]);
    list.expect_exit(0);
    let list: Value = serde_json::from_str(&list.lines().join("\n")).unwrap();
    assert_eq!(list.as_array().unwrap().last().unwrap()["step"], 4);
}

fn coordinator_command(arguments: &[&str]) -> peapod_tests::harness::Process {
    peapod_tests::harness::Process::start(&format!("coordinator {}", arguments.join(" ")), "coordinator", arguments)
}

#[test]
fn completions_and_the_facts_of_the_build_are_there() {
    let mut completions = coordinator_command(&["completions", "bash"]);
    completions.expect_exit(0);
    completions.assert_said("--min-world-size");
    let mut version = coordinator_command(&["--version"]);
    version.expect_exit(0);
    version.assert_said("protocol");
    version.assert_said("rustc");
}

#[test]
fn status_says_all_of_a_job_and_a_watch_how_it_ends() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000).set("validation.shards", vec!["tests/demo/shards/00005.tar"]);
    cluster.job.set("validation.samples", 4).set("validation.every_steps", 2);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    let page = page_of(&coordinator);
    coordinator.wait_for_step(4);
    let mut watch = coordinator.control(&["status", "--watch"]);
    let mut machine = coordinator.control(&["status", "--watch", "--json"]);
    watch.wait_for("losses at step ");
    let mut status = coordinator.control(&["status"]);
    status.expect_exit(0);
    for words in
        ["page and metrics: http://", " left, until 20", " samples/s", " a step", "goodput ", "; learning rate ", "validation at step "]
    {
        status.assert_said(words);
    }
    let mut json = coordinator.control(&["status", "--json"]);
    json.expect_exit(0);
    let json: Value = serde_json::from_str(&json.lines().join("\n")).unwrap();
    assert_eq!(json["page"], format!("http://{page}/"));
    for number in ["samples_per_s", "step_s", "left_s"] {
        assert!(json[number].as_f64().unwrap() > 0.0, "{number}: {json}");
    }
    assert!(json["newest"]["learning_rate"].as_f64().is_some() && json["goodput"]["ratio"].as_f64().unwrap() > 0.0, "{json}");
    assert!(json["workers"][1]["memory_bytes"].as_u64().unwrap() > 1 << 20 && json["workers"][1]["gpu_memory_bytes"].is_null(), "{json}");

    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
    watch.expect_exit(0);
    watch.assert_said("the job is stopped, at step ");
    machine.expect_exit(0);
    let last: Value = serde_json::from_str(machine.lines().last().unwrap()).unwrap();
    assert_eq!(last["end"]["outcome"], "stopped", "{last}");
    assert!(last["ended_unix_s"].as_f64() > json["unix_s"].as_f64(), "{last}");
}

#[test]
fn watch_of_a_job_that_fails_says_why_and_fails() {
    let cluster = long();
    let mut coordinator = cluster.coordinator(2, &["--join-timeout", "3s"]);
    let mut watch = coordinator.control(&["status", "--watch"]);
    coordinator.expect_exit(1);
    watch.expect_exit(1);
    watch.assert_said("coordinator: the job has failed, at step 0: waiting for ranks 0-1 for 3 s (--join-timeout)");
}

/// The folder for the pictures is named by $PEAPOD_SCREENSHOTS, to look at them.
#[test]
#[ignore = "needs chromium and node; part of make test-all"]
fn page_is_whole_in_a_browser_at_both_widths_and_in_both_colours() {
    let is_there = |program: &str| Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    let missing: Vec<&str> = ["chromium", "node"].into_iter().filter(|program| !is_there(program)).collect();
    if !missing.is_empty() {
        println!("skipped: {} is missing", missing.join(" and "));
        return;
    }
    let mut cluster = long();
    cluster.job.set("data.shards", vec!["tests/demo/shards/{00000..00004}.tar"]);
    cluster.job.set("validation.shards", vec!["tests/demo/shards/00005.tar"]);
    cluster.job.set("validation.samples", 8).set("validation.every_steps", 5);
    let prompts = ["红色的圆形", "蓝色的五角星"].map(String::from).to_vec();
    cluster.job.set("pictures.prompts", prompts).set("pictures.every_steps", 10).set("pictures.steps", 4);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    let page = page_of(&coordinator);
    coordinator.wait_for_step(20);
    let step = state(&page)["step"].as_u64();
    let kept = std::env::var_os("PEAPOD_SCREENSHOTS").map_or_else(|| cluster.folder().join("screenshots"), Into::into);
    let script = ["--experimental-websocket", "web/screenshots.mjs", &format!("http://{page}/"), kept.to_str().unwrap()].map(String::from);
    let output = Command::new("node").args(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for name in ["desktop-light", "desktop-dark", "phone-light", "phone-dark"] {
        let picture = image::open(kept.join(format!("{name}.png"))).unwrap().to_rgb8();
        let colours: BTreeSet<[u8; 3]> = picture.pixels().map(|pixel| pixel.0).collect();
        assert!(colours.len() > 200, "{name} is nearly empty");
    }
    assert!(state(&page)["step"].as_u64() > step, "the job goes on meanwhile");
    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
}
