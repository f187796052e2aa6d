use super::*;

async fn write(store: &Store, step: u64, seal: bool) {
    let (step, generation) = (Step(step), Generation(1));
    let mut writer = store.begin_part(step, generation, "adapter.safetensors").await.unwrap();
    writer.write(bytes::Bytes::from_static(b"weights")).await.unwrap();
    writer.finish().await.unwrap();
    if seal {
        let parts = vec![Part { name: "adapter.safetensors".into(), num_bytes: 7, sha256: hex::encode(sha256(b"weights")) }];
        let validation = Some(ValidationLosses { step, samples: 3, task: 0.5, logit: f32::NAN, feature: 2.0 }.into());
        let manifest = Manifest { format: Manifest::FORMAT, step, generation, job: String::new(), shards: Vec::new(), validation, parts };
        store.seal(manifest, &Ledger::new(1)).await.unwrap();
    }
}

#[tokio::test]
async fn reader_takes_the_newest_whole_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::local(folder.path()).unwrap();
    assert!(store.newest().await.unwrap().is_none());
    write(&store, 9, true).await;
    write(&store, 100, true).await;
    write(&store, 200, false).await;
    let (manifest, ledger) = store.newest().await.unwrap().unwrap();
    assert_eq!((manifest.step, ledger), (Step(100), Ledger::new(1)));
    let losses = Validation { step: Step(100), samples: 3, task: Some(0.5), logit: None, feature: Some(2.0) };
    assert_eq!(manifest.validation, Some(losses));
}

#[tokio::test]
async fn whole_checkpoint_is_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::local(folder.path()).unwrap();
    write(&store, 1, true).await;
    let manifest = store.list().await.unwrap().remove(0);
    assert!(store.seal(manifest, &Ledger::new(1)).await.is_err());
}

#[tokio::test]
async fn damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::local(folder.path()).unwrap();
    write(&store, 1, true).await;
    let part = folder.path().join("step-000000001-g000001/adapter.safetensors");
    std::fs::write(&part, b"half").unwrap();
    let error = store.newest().await.unwrap_err().to_string();
    assert!(error.contains("adapter.safetensors has 4 bytes, the manifest says 7"), "{error}");
    std::fs::write(&part, b"weighty").unwrap();
    let error = store.newest().await.unwrap_err().to_string();
    assert!(error.contains("is damaged: adapter.safetensors does not have the manifest's SHA-256"), "{error}");
    std::fs::write(folder.path().join("step-000000001-g000001/manifest.json"), b"{").unwrap();
    assert!(matches!(store.newest().await, Err(StoreError::Damaged { .. })));
}

#[tokio::test]
async fn damaged_old_manifest_keeps_nobody_from_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::local(folder.path()).unwrap();
    write(&store, 1, true).await;
    write(&store, 2, true).await;
    std::fs::write(folder.path().join("step-000000001-g000001/manifest.json"), b"{").unwrap();
    assert_eq!(store.newest().await.unwrap().unwrap().0.step, Step(2));
    assert_eq!(store.list().await.unwrap().len(), 1);
    store.retain(1).await.unwrap();
    assert!(!folder.path().join("step-000000001-g000001").exists(), "it is old all the same");
}

#[tokio::test]
async fn store_of_objects_is_one_like_a_folder() {
    let objects = Arc::new(object_store::memory::InMemory::new());
    let store = Store::of(Arc::new(PrefixStore::new(objects.clone(), "runs/a")), "s3://bucket/runs/a");
    assert!(store.newest().await.unwrap().is_none());
    for (step, seal) in [(1, true), (2, false), (3, true), (4, true)] {
        write(&store, step, seal).await;
    }
    assert!(store.is_whole(Step(3), Generation(1)).await.unwrap() && !store.is_whole(Step(2), Generation(1)).await.unwrap());
    let (manifest, ledger) = store.newest().await.unwrap().unwrap();
    assert_eq!((manifest.step, ledger), (Step(4), Ledger::new(1)));
    assert!(store.seal(manifest, &Ledger::new(1)).await.is_err(), "a whole one is never overwritten");
    store.retain(2).await.unwrap();
    let mut left: Vec<String> = objects.list(None).map_ok(|object| object.location.to_string()).try_collect().await.unwrap();
    left.sort();
    let files = |step| [("adapter.safetensors"), LEDGER, MANIFEST].map(|file| format!("runs/a/step-00000000{step}-g000001/{file}"));
    assert_eq!(left, [files(3), files(4)].concat());
    assert_eq!(store.location(Step(4), Generation(1)), "s3://bucket/runs/a/step-000000004-g000001");
}

#[tokio::test]
async fn store_that_another_has_taken_over_takes_nothing() {
    let objects: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
    let [mut older, mut newer] = [(); 2].map(|()| Store::of(Arc::clone(&objects), "s3://bucket/run"));
    let owner = |id: &str| Owner { id: id.into(), host: format!("host-{id}"), since: "2026-01-02T03:04:05Z".into() };
    older.take_over(owner("1")).await.unwrap();
    write(&older, 1, true).await;
    assert_eq!(newer.read_owner().await.unwrap(), Some(owner("1")));
    newer.take_over(owner("2")).await.unwrap();
    let refused = [
        older.begin_part(Step(2), Generation(1), "adapter.safetensors").await.map(drop).unwrap_err(),
        older.seal(older.list().await.unwrap().remove(0), &Ledger::new(1)).await.unwrap_err(),
        older.retain(1).await.unwrap_err(),
        older.remove(Step(1), Generation(1)).await.unwrap_err(),
    ];
    for error in refused {
        assert_eq!(
            error.to_string(),
            "checkpoint store s3://bucket/run: the coordinator on host-2 has it since 2026-01-02T03:04:05Z; two must not write there, \
             and this is the older one"
        );
    }
    write(&newer, 2, true).await;
    assert_eq!(newer.newest_manifest().await.unwrap().unwrap().step, Step(2), "its owner's name is no checkpoint");
    // Taken back; and a store that somebody has cleared is whoever's goes on.
    older.take_over(owner("1")).await.unwrap();
    assert!(newer.check_owner().await.is_err() && older.check_owner().await.is_ok());
    objects.delete(&Key::from("coordinator.json")).await.unwrap();
    assert!(older.check_owner().await.is_ok());
}

#[tokio::test]
async fn file_that_is_not_finished_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::local(folder.path()).unwrap();
    let mut writer = store.begin_part(Step(1), Generation(1), "adapter.safetensors").await.unwrap();
    // More than one piece: the first is on the disk.
    writer.write(bytes::Bytes::from(vec![7; 16 << 20])).await.unwrap();
    // Looked for on the disk: the store does not list files that are not finished.
    let files = || std::fs::read_dir(folder.path().join("step-000000001-g000001")).map_or(0, Iterator::count);
    assert_eq!(files(), 1);
    drop(writer);
    for _ in 0..1000 {
        if files() == 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("what was written of it stays");
}

/// Notes whether it is given up.
#[derive(Debug)]
struct Upload(Arc<std::sync::atomic::AtomicBool>);

#[tonic::async_trait]
impl object_store::MultipartUpload for Upload {
    fn put_part(&mut self, _: PutPayload) -> object_store::UploadPart {
        Box::pin(async { Ok(()) })
    }

    async fn complete(&mut self) -> object_store::Result<object_store::PutResult> {
        Err(object_store::Error::NotImplemented { operation: "complete".into(), implementer: "a test".into() })
    }

    async fn abort(&mut self) -> object_store::Result<()> {
        self.0.store(true, std::sync::atomic::Ordering::Release);
        Ok(())
    }
}

#[tokio::test]
async fn upload_that_is_not_finished_is_given_up() {
    let is_given_up = Arc::default();
    let writer = WriteMultipart::new(Box::new(Upload(Arc::clone(&is_given_up))));
    drop(PartWriter { writer: Some(writer), root: String::new() });
    tokio::task::yield_now().await;
    assert!(is_given_up.load(std::sync::atomic::Ordering::Acquire));
}

#[tokio::test]
async fn file_that_is_missing_is_damage() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::local(folder.path()).unwrap();
    write(&store, 1, true).await;
    std::fs::remove_file(folder.path().join("step-000000001-g000001/adapter.safetensors")).unwrap();
    let error = store.newest().await.unwrap_err();
    assert!(matches!(&error, StoreError::Damaged { reason, .. } if reason == "adapter.safetensors is missing"), "{error}");
}

#[cfg(not(feature = "aws"))]
#[test]
fn address_that_this_build_cannot_reach_says_which_can() {
    let error = Store::at("s3://bucket/run").unwrap_err().to_string();
    assert_eq!(error, "checkpoint store s3://bucket/run: this build has no S3 support: build with --features aws");
    let error = Store::at("http://host/run").unwrap_err().to_string();
    assert!(error.ends_with("http://host/run: nothing can be written there: a store is s3://, gs:// or az://"), "{error}");
}

#[tokio::test]
async fn retention_keeps_the_newest_and_clears_half_ones_before_them() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::local(folder.path()).unwrap();
    for (step, seal) in [(1, true), (2, false), (3, true), (4, false), (5, true), (6, false)] {
        write(&store, step, seal).await;
    }
    store.retain(2).await.unwrap();
    let steps: Vec<_> = store.list().await.unwrap().iter().map(|manifest| manifest.step.0).collect();
    assert_eq!(steps, [3, 5]);
    assert!(!folder.path().join("step-000000001-g000001").exists(), "nor its folder");
    assert!([2, 4].iter().all(|step| !folder.path().join(format!("step-00000000{step}-g000001")).exists()), "nobody finishes them");
    assert!(folder.path().join("step-000000006-g000001/adapter.safetensors").exists(), "it may still be on its way");
}
