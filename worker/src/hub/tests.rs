//! Fetches from a hub that fails as it is told to.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Mutex;

use sha2::{Digest, Sha256};

use super::*;
use crate::testing::http::{Fault, Habits};
use crate::testing::hub::HubServer;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Notes what it is told.
#[derive(Default)]
struct Told {
    lines: Mutex<Vec<String>>,
    num_bytes: Mutex<u64>,
}

impl Watch for Told {
    fn say(&self, line: &str) {
        self.lines.lock().unwrap().push(line.to_owned());
    }

    fn moved(&self, num_bytes: u64) {
        *self.num_bytes.lock().unwrap() += num_bytes;
    }
}

fn name(text: &str) -> HubName {
    HubName::parse(text).unwrap()
}

fn weights(seed: u8) -> Vec<u8> {
    (0..50_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8 ^ seed).collect()
}

/// A hub with a model, an encoder's, say.
fn hub() -> (HubServer, Hub) {
    let server = HubServer::start();
    let weights = weights(0);
    let files: [(&str, &[u8]); 5] = [
        ("README.md", b"nothing to load"),
        ("config.json", b"{}"),
        ("model.safetensors", &weights),
        ("pytorch_model.bin", b"the same once more"),
        ("vocab.txt", b"[PAD]"),
    ];
    server.put("org/model", "main", COMMIT, &files);
    // Of a hub that is gone nobody waits for long here.
    let hub = Hub { asking: Sources::new(SourceOptions::impatient()), ..Hub::new(&server.endpoint(), None, false) };
    (server, hub)
}

fn fetch(hub: &Hub, model: &str, cache: &Path) -> Result<PathBuf, HubError> {
    hub.fetch(&name(model), cache, &Told::default())
}

#[test]
fn what_is_loaded_comes_into_the_cache_as_the_python_libraries_have_it() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    let told = Told::default();
    let snapshot = hub.fetch(&name("org/model"), cache.path(), &told).unwrap();
    let folder = cache.path().join("models--org--model");
    assert_eq!(snapshot, folder.join("snapshots").join(COMMIT));
    assert_eq!(name("org/model").snapshot(cache.path()), Some(snapshot.clone()));
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights(0));
    assert_eq!(std::fs::read(snapshot.join("vocab.txt")).unwrap(), b"[PAD]");
    assert!(!snapshot.join("pytorch_model.bin").exists() && !snapshot.join("README.md").exists());
    let digest = hex::encode(Sha256::digest(weights(0)));
    assert_eq!(std::fs::read_link(snapshot.join("model.safetensors")).unwrap(), Path::new("../../blobs").join(digest));
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(folder.join("blobs").read_dir().unwrap().count(), 3, "no part is left");
    assert_eq!(*told.num_bytes.lock().unwrap(), 50_000 + 2 + 5);
    let lines = told.lines.lock().unwrap().join("\n");
    assert!(lines.contains("fetching org/model from http://") && lines.contains(": 3 files, 50.0 kB"), "{lines}");

    let _ = server.hub.take_requests();
    hub.fetch(&name("org/model"), cache.path(), &told).unwrap();
    assert_eq!(server.hub.take_requests(), ["GET /api/models/org/model/revision/main?blobs=true 0-8388607"], "nothing is fetched again");
}

#[test]
fn parts_of_a_model_lie_in_its_folders_and_a_second_revision_shares_what_is_alike() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    let (unet, vae) = (weights(1), weights(2));
    let other = COMMIT.replace('0', "f");
    let files = |config: &'static [u8]| -> Vec<(&str, &[u8])> {
        vec![
            ("unet/config.json", config),
            ("unet/diffusion_pytorch_model.safetensors", &unet),
            ("vae/diffusion_pytorch_model.safetensors", &vae),
        ]
    };
    server.put("org/sdxl", "main", COMMIT, &files(b"{}"));
    server.put("org/sdxl", "refs%2Fpr%2F1", &other, &files(b"{ }"));
    let first = fetch(&hub, "org/sdxl", cache.path()).unwrap();
    let _ = server.store.take_requests();
    let second = fetch(&hub, "org/sdxl@refs/pr/1", cache.path()).unwrap();
    assert_eq!(std::fs::read(first.join("vae/diffusion_pytorch_model.safetensors")).unwrap(), vae);
    assert_eq!(std::fs::read(second.join("unet/diffusion_pytorch_model.safetensors")).unwrap(), unet);
    assert_eq!(std::fs::read(second.join("unet/config.json")).unwrap(), b"{ }");
    assert_eq!(server.store.take_requests(), Vec::<String>::new(), "weights are here already");
    assert_eq!(name("org/sdxl@refs/pr/1").snapshot(cache.path()), Some(second));
}

#[test]
fn a_fetch_that_was_broken_off_goes_on_where_it_was() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    let blobs = cache.path().join("models--org--model/blobs");
    let part = blobs.join(hex::encode(Sha256::digest(weights(0))) + ".part");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(&part, &weights(0)[..30_000]).unwrap();
    server.store.fail_next([Fault::CutAfter(5_000)]);
    let snapshot = fetch(&hub, "org/model", cache.path()).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights(0));
    let asked: Vec<String> = server.store.take_requests();
    assert!(asked.len() == 2 && asked[0].contains(" 30000-") && asked[1].contains(" 35000-"), "{asked:?}");
}

#[test]
fn what_is_not_whole_is_not_found() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    server.store.set_habits(Habits { token: Some(Some("secret")), ..Habits::default() });
    assert!(fetch(&hub, "org/model", cache.path()).is_err());
    assert_eq!(name("org/model").snapshot(cache.path()), None);
    assert_eq!(name(&format!("org/model@{COMMIT}")).snapshot(cache.path()), None);
    server.store.set_habits(Habits::default());
    fetch(&hub, "org/model", cache.path()).unwrap();
    assert!(name("org/model").snapshot(cache.path()).is_some());
}

#[test]
fn snapshot_of_which_another_program_fetched_a_part_is_filled() {
    let ((_server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    let snapshot = cache.path().join("models--org--model/snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::write(snapshot.join("config.json"), "theirs").unwrap();
    hub.bring(&name("org/model"), cache.path(), &Told::default()).unwrap();
    assert_eq!(std::fs::read_to_string(snapshot.join("config.json")).unwrap(), "theirs");
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights(0));
}

#[test]
fn part_of_a_model_has_to_do_where_the_hub_does_not_answer_and_a_whole_one_needs_no_hub() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    let bring = |told: &Told| hub.bring(&name("org/model"), cache.path(), told);
    bring(&Told::default()).unwrap();
    let _ = server.hub.take_requests();
    bring(&Told::default()).unwrap();
    assert_eq!(server.hub.take_requests(), Vec::<String>::new());
    let snapshot = name("org/model").snapshot(cache.path()).unwrap();
    std::fs::remove_file(snapshot.join("vocab.txt")).unwrap();
    drop(server);
    let told = Told::default();
    bring(&told).unwrap();
    assert!(told.lines.lock().unwrap().iter().any(|line| line.ends_with("going on with what the cache has of it")));
    std::fs::remove_dir_all(&snapshot).unwrap();
    assert!(bring(&told).is_err());
}

#[test]
fn snapshot_that_another_program_makes_meanwhile_is_filled() {
    let cache = tempfile::tempdir().unwrap();
    let blob = cache.path().join("blobs/0123");
    std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
    std::fs::write(&blob, "weights").unwrap();
    let snapshot = cache.path().join("snapshots").join(COMMIT);
    // As if it had come between the look and the renaming.
    std::fs::create_dir_all(snapshot.join("unet")).unwrap();
    std::fs::write(snapshot.join("unet/config.json"), "theirs").unwrap();
    place(&[(blob, "unet/model.safetensors")], &snapshot).unwrap();
    assert_eq!(std::fs::read_to_string(snapshot.join("unet/model.safetensors")).unwrap(), "weights");
    assert_eq!(std::fs::read_to_string(snapshot.join("unet/config.json")).unwrap(), "theirs");
}

#[test]
fn file_that_another_host_writes_to_as_well_is_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let part = folder.path().join("0123.part");
    let mut incoming = Incoming::open(&part, Some(7)).ok().unwrap();
    incoming.write(b"weights").ok().unwrap();
    OpenOptions::new().append(true).open(&part).unwrap().write_all(b"wei").unwrap();
    let received = incoming.finish().ok().unwrap();
    assert_eq!((received.len, received.is_alone), (7, false));
}

#[test]
fn nothing_is_fetched_offline() {
    let ((server, _), cache) = (hub(), tempfile::tempdir().unwrap());
    let offline = Hub::new(&server.endpoint(), None, true);
    offline.bring(&name("org/model"), cache.path(), &Told::default()).unwrap();
    let error = fetch(&offline, "org/model", cache.path()).unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }) && error.is_permanent(), "{error}");
    assert_eq!(server.hub.take_requests(), Vec::<String>::new());
}

#[test]
fn damage_is_found_mended_if_it_is_ours_and_named_if_it_is_not() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    let digest = hex::encode(Sha256::digest(weights(0)));
    let blobs = cache.path().join("models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{digest}.part")), [7; 100]).unwrap();
    let told = Told::default();
    let snapshot = hub.fetch(&name("org/model"), cache.path(), &told).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights(0));
    assert!(told.lines.lock().unwrap().iter().any(|line| line.contains("model.safetensors arrived damaged")));

    std::fs::remove_dir_all(cache.path()).unwrap();
    server.store.put(&digest, &weights(9));
    let error = fetch(&hub, "org/model", cache.path()).unwrap_err();
    assert!(matches!(&error, HubError::Damaged { file, expected, .. } if file == "model.safetensors" && *expected == digest), "{error}");
    assert_eq!(name("org/model").snapshot(cache.path()), None);

    server.store.put(&digest, &weights(0)[..49_999]);
    let error = fetch(&hub, "org/model", cache.path()).unwrap_err();
    assert!(matches!(error, HubError::Damaged { .. }), "{error}");
}

#[test]
fn a_token_is_shown_to_the_hub_and_not_to_its_store() {
    let ((server, anybody), cache) = (hub(), tempfile::tempdir().unwrap());
    server.hub.set_habits(Habits { token: Some(Some("hf_secret")), ..Habits::default() });
    server.store.set_habits(Habits { token: Some(None), ..Habits::default() });
    let error = fetch(&anybody, "org/model", cache.path()).unwrap_err();
    assert!(matches!(error, HubError::Denied { .. }) && error.is_permanent(), "{error}");
    assert!(error.to_string().contains("asked without a token") && error.to_string().contains("set HF_TOKEN"), "{error}");
    let known = Hub::new(&server.endpoint(), Some("hf_secret".into()), false);
    fetch(&known, "org/model", cache.path()).unwrap();
    assert!(!format!("{known:?}").contains("hf_secret"));
    // What stands before the store and lets nobody through says nothing of the model.
    std::fs::remove_dir_all(cache.path()).unwrap();
    server.store.set_habits(Habits { token: Some(Some("other")), ..Habits::default() });
    let error = fetch(&known, "org/model", cache.path()).unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }) && error.to_string().contains("401 Unauthorized at 127.0.0.1"), "{error}");
}

/// The real hub tells nobody without a token that a repository is not there.
#[test]
fn what_a_hub_hides_from_strangers_may_be_missing() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    server.hub.set_habits(Habits { token: Some(Some("hf_secret")), error_code: Some("RepoNotFound"), ..Habits::default() });
    let error = fetch(&hub, "models/sdlx", cache.path()).unwrap_err();
    assert!(matches!(error, HubError::Missing { .. }) && error.is_permanent(), "{error}");
    assert!(error.to_string().ends_with("has no model of this name that it shows to everybody; HF_TOKEN opens private ones"), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    let refuse = |hub: &Hub, model: &str| fetch(hub, model, cache.path()).unwrap_err();
    let error = refuse(&hub, "models/sdxl");
    assert!(error.is_permanent() && error.to_string().starts_with("models/sdxl: there is no such file or folder in /"), "{error}");
    let error = refuse(&hub, "org/model@v2");
    assert!(error.to_string().ends_with("no model of this name, or not the revision v2"), "{error}");
    server.put("org/data", "main", COMMIT, &[("table.csv", b"1,2")]);
    assert!(matches!(refuse(&hub, "org/data"), HubError::NoModel { num_files: 1, .. }));
    server.hub.put("api/models/org/page/revision/main", b"<html>");
    let error = refuse(&hub, "org/page");
    assert!(error.to_string().contains("answers as no hub does") && !error.is_permanent(), "{error}");
    server.hub.put("api/models/org/trap/revision/main", br#"{"sha": "../..", "siblings": []}"#);
    assert!(refuse(&hub, "org/trap").to_string().contains("names no commit"));
    let huge = format!(r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "model.safetensors", "size": {}}}]}}"#, 1_u64 << 60);
    server.hub.put("api/models/org/huge/revision/main", huge.as_bytes());
    let error = refuse(&hub, "org/huge");
    assert!(matches!(error, HubError::NoSpace { .. }) && error.to_string().contains("set HF_HOME"), "{error}");
    drop(server);
    let error = refuse(&hub, "org/model");
    assert!(error.to_string().contains("`worker fetch org/model`") && !error.is_permanent(), "{error}");
    let file = cache.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = fetch(&hub, "org/model", &file).unwrap_err();
    assert!(
        matches!(error, HubError::Cache { .. }) && error.to_string().starts_with("org/model: there is no such file or folder in /"),
        "{error}"
    );
}

#[test]
fn files_of_a_repository_do_not_lead_out_of_the_cache() {
    let ((server, hub), cache) = (hub(), tempfile::tempdir().unwrap());
    let listing = format!(
        r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "../../../config.json", "size": 2}}, {{"rfilename": "vocab.txt", "size": 5}}]}}"#
    );
    server.hub.put("api/models/org/model/revision/main", listing.as_bytes());
    let snapshot = fetch(&hub, "org/model", cache.path()).unwrap();
    let files: Vec<_> = snapshot.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["vocab.txt"], "also where a mirror says little of a file");
    assert!(!cache.path().join("config.json").exists());

    // Which is then no other commit's.
    let other = COMMIT.replace('0', "f");
    server.hub.put("api/models/org/model/revision/v2", listing.replace(COMMIT, &other).as_bytes());
    server.hub.put(&format!("org/model/resolve/{other}/vocab.txt"), b"[UNK]");
    let second = fetch(&hub, "org/model@v2", cache.path()).unwrap();
    assert_eq!(std::fs::read(second.join("vocab.txt")).unwrap(), b"[UNK]");
    assert_eq!(std::fs::read(snapshot.join("vocab.txt")).unwrap(), b"[PAD]");
}

#[test]
fn of_several_that_want_a_model_one_fetches_it() {
    let ((server, _), cache) = (hub(), tempfile::tempdir().unwrap());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let hub = Hub::new(&server.endpoint(), None, false);
                hub.bring(&name("org/model"), cache.path(), &Told::default()).unwrap();
            });
        }
    });
    assert_eq!(server.store.take_requests().len(), 1);
    assert_eq!(server.hub.take_requests().iter().filter(|request| request.contains("/api/")).count(), 1, "nor is the hub asked again");
}
