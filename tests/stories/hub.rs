//! Models that are on no machine yet: fetched from a hub as they are first needed.

use std::path::{Path, PathBuf};

use peapod_tests::harness::{Cluster, Fault, Habits, HubServer, Process, workspace};

const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// The demo's models on a hub, a job that names them there, and a home without them.
struct Hub {
    server: HubServer,
    cluster: Cluster,
}

impl Hub {
    fn with_demo() -> Self {
        let server = HubServer::start();
        let demo = workspace().join("tests/demo/model");
        server.put_folder("peapod/tiny-sdxl", COMMIT, &demo, "text_encoder_zh");
        server.put_folder("peapod/tiny-clip", COMMIT, &demo.join("text_encoder_zh"), "");
        let mut cluster = Cluster::new();
        cluster.job.set("model.path", "peapod/tiny-sdxl").set("student.path", "peapod/tiny-clip");
        Self { server, cluster }
    }

    fn home(&self) -> PathBuf {
        self.cluster.folder().join("home")
    }

    fn environment(&self) -> [(&'static str, String); 3] {
        let home = self.home().to_str().unwrap().to_owned();
        [("HF_ENDPOINT", self.server.endpoint()), ("HF_HOME", home), ("HF_HUB_OFFLINE", "0".into())]
    }
}

fn num_files_below(folder: &Path) -> usize {
    let entries = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { num_files_below(&path) } else { 1 }).sum()
}

#[test]
fn models_of_the_hub_are_fetched_once_a_host_and_trained_and_drawn_with() {
    let hub = Hub::with_demo();
    hub.server.store.set_habits(Habits { fails_every: Some((3, Fault::CutAfter(20_000))), ..Habits::default() });
    let mut coordinator = hub.cluster.coordinator(2, &[]);
    let environment = hub.environment();
    let worker = |rank: usize| coordinator.worker_with(&format!("rank {rank}"), &["--rank", &rank.to_string()], &environment);
    let mut workers: Vec<Process> = (0..2).map(worker).collect();
    coordinator.expect_exit(0);
    workers.iter_mut().for_each(|worker| worker.expect_exit(0));

    let fetched: Vec<String> = workers.iter().flat_map(|worker| worker.lines_with("fetched peapod/tiny-")).collect();
    assert_eq!(fetched.len(), 2, "each model by one of them: {fetched:?}");
    let asked = hub.server.hub.take_requests();
    assert_eq!(asked.iter().filter(|request| request.contains("/api/models/")).count(), 2, "{asked:?}");
    assert_eq!(num_files_below(&hub.home().join("hub/models--peapod--tiny-clip/snapshots")), 3);

    // The adapter names its encoder; nothing is asked of the hub any more.
    let picture = hub.cluster.folder().join("picture.png");
    let checkpoints = hub.cluster.state_dir().join("checkpoints");
    let arguments = ["--model", "peapod/tiny-sdxl", "--adapter", checkpoints.to_str().unwrap(), "--prompt", "红色的圆形", "--steps", "2"];
    let arguments: Vec<&str> = arguments.into_iter().chain(["--out", picture.to_str().unwrap()]).collect();
    let mut drawing = Process::start_with("sample", "sample", &arguments, &[("HF_HOME", environment[1].1.clone())]);
    drawing.expect_exit(0);
    assert!(picture.is_file());
    assert_eq!(hub.server.hub.take_requests(), Vec::<String>::new());
}

#[test]
fn fetch_brings_what_a_job_names_and_says_where_it_is() {
    let hub = Hub::with_demo();
    let job = hub.cluster.folder().join("job.toml");
    std::fs::write(&job, hub.cluster.job.to_string()).unwrap();
    let fetch = |arguments: &[&str]| Process::start_with("worker fetch", "worker", &[&["fetch"], arguments].concat(), &hub.environment());
    let mut whole = fetch(&["--job", job.to_str().unwrap()]);
    whole.expect_exit(0);
    whole.assert_said("fetching peapod/tiny-sdxl from http://127.0.0.1:");
    let snapshot = hub.home().join("hub/models--peapod--tiny-clip/snapshots").join(COMMIT);
    whole.assert_said(snapshot.to_str().unwrap());
    assert!(snapshot.join("model.safetensors").is_file());
    let mut check = Process::start_with("check", "worker", &["check", "--job", job.to_str().unwrap()], &hub.environment());
    check.expect_exit(0);

    let mut unknown = fetch(&["peapod/other"]);
    unknown.expect_exit(2);
    let folder = workspace().display().to_string();
    unknown.assert_said(&format!("worker: peapod/other: there is no such file or folder in {folder}, and http://127.0.0.1:"));
    let mut path = fetch(&["./models"]);
    path.expect_exit(2);
    path.assert_said("a model on the hub is ORG/NAME or ORG/NAME@REVISION");
}

#[test]
fn mistyped_path_ends_the_job_and_says_that_the_hub_has_no_such_model_either() {
    let mut hub = Hub::with_demo();
    hub.cluster.job.set("model.path", "models/sdlx");
    let arguments = hub.cluster.local_arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut coordinator = Process::start_with("coordinator", "coordinator", &arguments, &hub.environment());
    coordinator.expect_exit(1);
    let reason = coordinator.lines_with("coordinator: ").pop().unwrap();
    assert!(reason.contains("models/sdlx: there is no such file or folder in /") && reason.contains(", and http://127.0.0.1:"), "{reason}");
}
