//! What is in deploy/ fits Kubernetes, the programs, and itself.
//!
//! Rendering and the schemas need `kubectl` and the packages of tests/manifests/requirements.txt, which `make test` installs into
//! .bench/manifests; without them these stories skip and say so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use peapod_coordinator::config::{Cli as Coordinator, RunArgs};
use peapod_proto::DEFAULT_PORT;
use peapod_proto::job::Job;
use peapod_tests::harness::workspace;
use peapod_worker::args::{Cli as Worker, Command};
use peapod_worker::device::Choice;
use peapod_worker::lifecycle::TRY_AGAIN;
use peapod_worker::setup;
use peapod_worker::supervisor::BAD_ARGUMENTS;
use serde_json::Value;

/// Exit code of a worker that SIGTERM sent away.
const SENT_AWAY: i64 = 143;

/// Where models of the hub are kept; no argument of ours.
const HUB_HOME: &str = "HF_HOME";

/// How many workers the script of a whole node starts; no argument of theirs.
const NUM_GPUS: &str = "NUM_GPUS";

fn deploy(path: &str) -> PathBuf {
    workspace().join("deploy").join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(deploy(path)).unwrap()
}

/// Runs tests/manifests/check.py on folders to be rendered, or files of YAML; nothing where it cannot run.
fn check(paths: &[PathBuf]) -> Option<Result<BTreeMap<String, Vec<Value>>, String>> {
    let python = workspace().join(".bench/manifests/bin/python");
    for (program, missing) in [(python.as_path(), "kubernetes-validate (make test installs it)"), (Path::new("kubectl"), "kubectl")] {
        let found = process::Command::new(program).arg(if program == python { "--version" } else { "help" }).output();
        if !found.is_ok_and(|output| output.status.success()) {
            println!("skipped: {missing} is not there");
            return None;
        }
    }
    let output = process::Command::new(python).arg(workspace().join("tests/manifests/check.py")).args(paths).output().unwrap();
    let problems = String::from_utf8(output.stderr).unwrap();
    Some(if output.status.success() { Ok(serde_json::from_slice(&output.stdout).unwrap()) } else { Err(problems) })
}

fn overlays() -> Vec<PathBuf> {
    let folders = std::fs::read_dir(deploy("kubernetes/overlays")).unwrap().map(|entry| entry.unwrap().path());
    folders.filter(|path| path.is_dir()).collect()
}

/// One overlay, taken apart.
struct Overlay {
    name: String,
    objects: Vec<Value>,
}

impl Overlay {
    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(move |object| object["kind"] == kind)
    }

    fn only(&self, kind: &str) -> &Value {
        let [object] = self.of_kind(kind).collect::<Vec<_>>()[..] else { panic!("{}: not one {kind}", self.name) };
        object
    }

    /// The spec of the workers' Job, by itself or in a JobSet.
    fn worker_job(&self) -> &Value {
        match self.of_kind("JobSet").next() {
            Some(set) => {
                &set["spec"]["replicatedJobs"].as_array().unwrap().iter().find(|job| job["name"] == "worker").unwrap()["template"]["spec"]
            }
            None => &self.only("Job")["spec"],
        }
    }

    /// The spec of the coordinator's pod.
    fn coordinator_pod(&self) -> &Value {
        match self.of_kind("JobSet").next() {
            Some(set) => &set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"],
            None => &self.only("StatefulSet")["spec"]["template"]["spec"],
        }
    }

    fn worker_pod(&self) -> &Value {
        &self.worker_job()["template"]["spec"]
    }

    /// Workers in a pod: one for each of its GPUs, or one without any.
    fn workers_of_a_pod(&self) -> u64 {
        let gpus = &self.worker_pod()["containers"][0]["resources"]["limits"]["nvidia.com/gpu"];
        gpus.as_str().map_or(1, |gpus| gpus.parse().unwrap())
    }

    /// What the coordinator makes of its arguments.
    fn run_args(&self) -> RunArgs {
        let container = &self.coordinator_pod()["containers"][0];
        let cli = Coordinator::try_parse_from(command_line(container)).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        cli.run.validate().unwrap_or_else(|problem| panic!("{}: {problem}", self.name));
        cli.run
    }
}

fn all() -> Option<Vec<Overlay>> {
    let rendered = check(&overlays())?.unwrap_or_else(|problems| panic!("{problems}"));
    Some(rendered.into_iter().map(|(name, objects)| Overlay { name, objects }).collect())
}

/// A container's variables that the manifest itself gives a value.
fn variables(container: &Value) -> BTreeMap<&str, &str> {
    let list = container["env"].as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|variable| Some((variable["name"].as_str()?, variable["value"].as_str()?))).collect()
}

/// A container's command line as the kubelet makes it: with the values of `$(VARIABLES)`.
fn command_line(container: &Value) -> Vec<String> {
    let variables = variables(container);
    let arguments = container["args"].as_array().unwrap().iter().map(|argument| {
        let argument = argument.as_str().unwrap().to_owned();
        variables.iter().fold(argument, |argument, (name, value)| argument.replace(&format!("$({name})"), value))
    });
    std::iter::once("program".to_owned()).chain(arguments).collect()
}

/// What a Job does about a worker's exit code.
fn action(job: &Value, code: i64) -> &str {
    let rules = job["podFailurePolicy"]["rules"].as_array().unwrap();
    let matches = |rule: &&Value| {
        let codes = &rule["onExitCodes"];
        let listed = codes["values"].as_array().is_some_and(|values| values.contains(&code.into()));
        codes.is_object() && listed == (codes["operator"] == "In")
    };
    rules.iter().find(matches).map_or("Count", |rule| rule["action"].as_str().unwrap())
}

#[test]
fn every_overlay_renders_into_what_kubernetes_takes() {
    let Some(overlays) = all() else { return };
    let names: Vec<&str> = overlays.iter().map(|overlay| overlay.name.rsplit('/').next().unwrap()).collect();
    assert_eq!(names, ["cpu-demo", "jobset", "kueue", "one-node", "three-nodes"]);
}

/// The objects of an overlay with a component; nothing where they cannot be rendered.
fn with_component(overlay: &str, component: &str) -> Option<Overlay> {
    let folder = tempfile::tempdir().unwrap();
    // Kustomize takes relative paths only.
    let folder_path = folder.path().canonicalize().unwrap();
    let up = "../".repeat(folder_path.components().count() - 1);
    let path = |path: &str| format!("{up}{}", deploy("kubernetes").join(path).strip_prefix("/").unwrap().display());
    let (overlay, component) = (path(&format!("overlays/{overlay}")), path(&format!("components/{component}")));
    let text = format!("resources: [{overlay}]\ncomponents: [{component}]\n");
    std::fs::write(folder_path.join("kustomization.yaml"), text).unwrap();
    let mut rendered = check(std::slice::from_ref(&folder_path))?.unwrap_or_else(|problems| panic!("{problems}"));
    Some(Overlay { name: component, objects: rendered.remove(folder_path.to_str().unwrap()).unwrap() })
}

#[test]
fn every_component_renders_into_what_kubernetes_takes() {
    let mut names: Vec<String> = std::fs::read_dir(deploy("kubernetes/components"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["prometheus", "rdma", "whole-node"]);
    let Some(rdma) = with_component("one-node", "rdma") else { return };
    let limits = &rdma.worker_pod()["containers"][0]["resources"]["limits"];
    assert!(limits["rdma/hca_shared_devices_a"] == "1" && limits["nvidia.com/gpu"] == "8", "{limits}");
    let nccl = rdma.of_kind("ConfigMap").find(|map| map["metadata"]["name"] == "peapod-nccl").unwrap();
    assert_eq!(nccl["data"], serde_json::json!({"NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "mlx5"}));

    let prometheus = with_component("three-nodes", "prometheus").unwrap();
    let monitor = &prometheus.only("PodMonitor")["spec"];
    let labels = &prometheus.only("StatefulSet")["spec"]["template"]["metadata"]["labels"];
    for (label, value) in monitor["selector"]["matchLabels"].as_object().unwrap() {
        assert_eq!(&labels[label], value);
    }
    let ports = prometheus.coordinator_pod()["containers"][0]["ports"].as_array().unwrap();
    assert!(ports.iter().any(|port| port["name"] == monitor["podMetricsEndpoints"][0]["port"]), "{ports:?}");

    // A node's GPUs in one pod: as many pods as nodes.
    let nodes = with_component("three-nodes", "whole-node").unwrap();
    assert_eq!(nodes.workers_of_a_pod(), 8);
}

#[test]
fn misspelled_field_is_found() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("kustomization.yaml"), "resources: [job.yaml]").unwrap();
    for (spec, words) in [
        ("apiVersion: batch/v1\nkind: Job\nmetadata: {name: a}\nspec: {backofLimit: 1, template: {spec: {containers: []}}}", "backofLimit"),
        ("apiVersion: jobset.x-k8s.io/v1alpha2\nkind: JobSet\nmetadata: {name: a}\nspec: {replicatedJob: []}", "replicatedJob"),
        ("apiVersion: batch/v7\nkind: Job\nmetadata: {name: a}", "batch/v7"),
    ] {
        std::fs::write(folder.path().join("job.yaml"), spec).unwrap();
        let Some(checked) = check(&[folder.path().to_owned()]) else { return };
        let problems = checked.unwrap_err();
        assert!(problems.contains(words), "{problems}");
    }
}

#[test]
fn world_is_as_large_as_the_workers_job() {
    for overlay in all().unwrap_or_default() {
        let (run, job) = (overlay.run_args(), overlay.worker_job());
        let (world, min) = (u64::from(run.world_size), u64::from(run.min_world_size()));
        let (pods, workers_of_a_pod) = (job["completions"].as_u64().unwrap(), overlay.workers_of_a_pod());
        assert_eq!(pods * workers_of_a_pod, world, "{}", overlay.name);
        assert_eq!(job["parallelism"], pods, "{}", overlay.name);
        // Nobody evicts more than the job can be without, or more than one at a time. One pod alone could only be kept from leaving.
        let budgets: Vec<&Value> = overlay.of_kind("PodDisruptionBudget").map(|budget| &budget["spec"]["minAvailable"]).collect();
        let least_pods = min.div_ceil(workers_of_a_pod);
        let expected: Vec<u64> = if pods == 1 { Vec::new() } else { vec![least_pods.min(pods - 1)] };
        assert_eq!(budgets, expected, "{}", overlay.name);
        // When too few are left to train, those that are left wait for nobody; the number cannot be above that of the pods.
        let mut spare = pods - least_pods;
        if let Some(least) =
            overlay.of_kind("Job").find_map(|job| job["metadata"]["annotations"]["kueue.x-k8s.io/job-min-parallelism"].as_str())
        {
            assert_eq!(least, least_pods.to_string(), "{}", overlay.name);
            spare = spare.min(least_pods);
        }
        assert_eq!(job["maxFailedIndexes"], spare, "{}", overlay.name);
        // GPUs may be queued for: that is no failure.
        assert!(run.join_timeout >= Duration::from_secs(3 * 86_400), "{}", overlay.name);
        let text = overlay.of_kind("ConfigMap").find_map(|map| map["data"]["job.toml"].as_str()).unwrap();
        let job = Job::parse(text).unwrap();
        assert!(job.train.global_batch >= run.world_size, "{}", overlay.name);
    }
}

#[test]
fn coordinator_stays_after_the_job_where_it_would_be_started_again() {
    for overlay in all().unwrap_or_default() {
        // A JobSet is complete when its coordinator has ended.
        let starts_again = overlay.of_kind("StatefulSet").next().is_some();
        assert_eq!(overlay.run_args().stay, starts_again, "{}", overlay.name);
    }
}

#[test]
fn nobody_is_let_in_without_token_and_certificate() {
    for overlay in all().unwrap_or_default() {
        let given = command_line(&overlay.coordinator_pod()["containers"][0]);
        assert!(given.iter().all(|argument| argument != "--insecure"), "{}", overlay.name);
        for name in ["--tls-cert=", "--tls-key=", "--token-file="] {
            assert!(given.iter().any(|argument| argument.starts_with(name)), "{}: {name}", overlay.name);
        }
        for pod in [overlay.coordinator_pod(), overlay.worker_pod()] {
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
            assert_eq!(pod["automountServiceAccountToken"], false);
            let volumes = pod["volumes"].as_array().unwrap();
            let secrets: Vec<&str> = volumes.iter().filter_map(|volume| volume["secret"]["secretName"].as_str()).collect();
            // The key of the certificate is for the coordinator alone.
            let expected: &[&str] =
                if pod["containers"][0]["name"] == "worker" { &["peapod-join"] } else { &["peapod-tls", "peapod-join"] };
            assert_eq!(secrets, expected, "{}", overlay.name);
        }
        assert_eq!(overlay.of_kind("NetworkPolicy").count(), 2, "{}", overlay.name);
    }
}

#[test]
fn ports_and_probes_are_where_the_coordinator_listens() {
    for overlay in all().unwrap_or_default() {
        let run = overlay.run_args();
        assert_eq!(run.listen_address().port(), DEFAULT_PORT);
        let container = &overlay.coordinator_pod()["containers"][0];
        let ports = |name: &str| {
            let all = container["ports"].as_array().unwrap();
            all.iter().find(|port| port["name"] == name).unwrap()["containerPort"].as_u64().unwrap()
        };
        assert_eq!(ports("control"), u64::from(DEFAULT_PORT));
        assert!(command_line(container).contains(&format!("--http-addr=0.0.0.0:{}", ports("web"))), "{}", overlay.name);
        for (probe, path) in [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
            assert_eq!(container[probe]["httpGet"], serde_json::json!({"path": path, "port": "web"}), "{}", overlay.name);
        }
        for service in overlay.of_kind("Service") {
            let port = &service["spec"]["ports"][0];
            assert_eq!(port["port"], ports(port["targetPort"].as_str().unwrap()), "{}", overlay.name);
        }
    }
}

#[test]
fn workers_take_the_arguments_and_variables_they_are_given() {
    let command = Worker::command();
    for overlay in all().unwrap_or_default() {
        let container = &overlay.worker_pod()["containers"][0];
        let mut line = command_line(container);
        if container["command"].is_array() {
            // What the script of a whole node adds.
            line.extend(["--device=cuda:7".to_owned(), "--rank=7".to_owned()]);
        }
        for variable in container["env"].as_array().unwrap() {
            let name = variable["name"].as_str().unwrap();
            if line[1..].iter().any(|argument| *argument == format!("--device={}", variable["value"].as_str().unwrap_or_default())) {
                continue;
            }
            if [HUB_HOME, NUM_GPUS].contains(&name) {
                continue;
            }
            let argument = command.get_arguments().find(|argument| argument.get_env().is_some_and(|env| env == name));
            let argument = argument.unwrap_or_else(|| panic!("{}: no argument reads {name}", overlay.name));
            let value = variable["value"].as_str().unwrap_or("7");
            line.push(format!("--{}={value}", argument.get_long().unwrap()));
        }
        let cli = Worker::try_parse_from(&line).unwrap_or_else(|error| panic!("{}: {error}", overlay.name));
        assert_eq!(cli.run.rank, Some(7), "{}: the rank is the completion index", overlay.name);
        let coordinator = variables(container)["PEAPOD_COORDINATOR"];
        let service = overlay
            .of_kind("Service")
            .find(|service| coordinator == format!("https://{}:{DEFAULT_PORT}", service["metadata"]["name"].as_str().unwrap()));
        assert!(service.is_some(), "{}: {coordinator} is no Service", overlay.name);
        let has_gpu = container["resources"]["limits"]["nvidia.com/gpu"].is_string();
        assert_eq!(has_gpu, matches!(cli.run.device, Choice::Cuda(_)), "{}", overlay.name);
    }
}

#[test]
fn models_are_fetched_to_where_the_workers_look_for_them() {
    let folder = deploy("kubernetes/fetch-models");
    let Some(rendered) = check(std::slice::from_ref(&folder)) else { return };
    let fetching = &rendered.unwrap()[folder.to_str().unwrap()][0]["spec"]["template"]["spec"];
    let container = &fetching["containers"][0];
    let Some(Command::Fetch(options)) = Worker::try_parse_from(command_line(container)).unwrap().command else { panic!("no fetch") };
    let job = Job::parse(&read("kubernetes/base/job.toml")).unwrap();
    let named = setup::model_paths(&job).map(|path| path.to_str().unwrap().to_owned());
    assert_eq!(options.models.iter().map(ToString::to_string).collect::<Vec<_>>(), named.collect::<Vec<_>>());
    for overlay in all().unwrap_or_default().iter().filter(|overlay| !overlay.name.ends_with("cpu-demo")) {
        let worker = overlay.worker_pod();
        let home = |container| variables(container)[HUB_HOME].to_owned();
        assert_eq!(home(&worker["containers"][0]), home(container), "{}", overlay.name);
        let claim = |pod: &Value| {
            let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap();
            let mount = mounts.iter().find(|mount| mount["mountPath"] == home(container)).unwrap();
            let volumes = pod["volumes"].as_array().unwrap();
            volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap()["persistentVolumeClaim"]["claimName"].clone()
        };
        assert_eq!(claim(worker), claim(fetching), "{}", overlay.name);
        assert_eq!(worker["securityContext"], fetching["securityContext"], "{}", overlay.name);
    }
}

#[test]
fn exit_codes_are_told_apart() {
    for overlay in all().unwrap_or_default() {
        let job = overlay.worker_job();
        for (code, expected) in [
            (TRY_AGAIN.into(), "Ignore"),
            (SENT_AWAY, "Ignore"),
            (BAD_ARGUMENTS.into(), "FailIndex"),
            (1, "Count"),
            (101, "Count"),
            (137, "Count"),
        ] {
            assert_eq!(action(job, code), expected, "{}: exit code {code}", overlay.name);
        }
        // No failure of one pod ends or restarts another that the job can go on with.
        assert!(job["backoffLimitPerIndex"].as_u64().unwrap() > 0, "{}", overlay.name);
        let rules = job["podFailurePolicy"]["rules"].as_array().unwrap();
        assert!(rules.iter().all(|rule| rule["action"] != "FailJob"), "{}", overlay.name);
    }
    let worker = read("systemd/worker@.service");
    for line in [
        format!("SuccessExitStatus={SENT_AWAY}"),
        format!("RestartForceExitStatus={TRY_AGAIN}"),
        format!("RestartPreventExitStatus={BAD_ARGUMENTS}"),
    ] {
        assert!(worker.lines().any(|there| there == line), "{line}");
    }
}

#[test]
fn units_and_compose_start_the_programs_with_arguments_they_take() {
    let command = |unit: &str| {
        let text = read(unit);
        let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let line = line.replace("${WORLD_SIZE}", "8").replace("${MIN_WORLD_SIZE}", "4").replace("%i", "3");
        let defaults = text.lines().filter_map(|line| line.strip_prefix("Environment=")?.split_once('='));
        let line = defaults.fold(line, |line, (name, value)| line.replace(&format!("${{{name}}}"), value));
        line.split(' ').map(str::to_owned).collect::<Vec<_>>()
    };
    let run = Coordinator::try_parse_from(command("systemd/coordinator.service")).unwrap().run;
    assert_eq!((run.validate(), run.world_size, run.min_world_size()), (Ok(()), 8, 4));
    // Workers that are started with their machine find it after the end of the job.
    assert!(run.stay);
    let mut line = command("systemd/worker@.service");
    line.push("--coordinator=http://a:1".into());
    assert_eq!(Worker::try_parse_from(line).unwrap().run.device, Choice::Cuda(Some(3)));

    let path = deploy("compose/compose.yaml");
    let Some(parsed) = check(std::slice::from_ref(&path)) else { return };
    let compose = &parsed.unwrap()[path.to_str().unwrap()][0];
    let arguments = |service: &str| {
        let arguments = compose["services"][service]["command"].as_array().unwrap().iter();
        let arguments =
            arguments.map(|argument| argument.as_str().unwrap().replace("${WORKERS:-3}", "3").replace("${MIN_WORKERS:-2}", "2"));
        std::iter::once("program".to_owned()).chain(arguments)
    };
    let run = Coordinator::try_parse_from(arguments("coordinator")).unwrap().run;
    assert_eq!(run.validate(), Ok(()));
    assert!(Worker::try_parse_from(arguments("worker").chain(["--coordinator=http://a:1".into()])).is_ok());
}

#[test]
fn demo_on_a_cluster_is_the_demo() {
    // The image of the worker has the files at the same paths.
    let settings = |text: &str| text.lines().skip_while(|line| line.starts_with('#')).collect::<Vec<_>>().join("\n");
    let demo = std::fs::read_to_string(workspace().join("tests/demo/job.toml")).unwrap();
    assert_eq!(settings(&read("kubernetes/overlays/cpu-demo/job.toml")), settings(&demo));
}
