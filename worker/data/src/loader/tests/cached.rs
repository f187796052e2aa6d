//! Shards of samples that were computed before, through the whole loader.

use super::*;
use crate::Error;
use crate::cached::{LATENTS, SKIPPED, STAMP, Stamp};
use crate::testing::cached_sample;

/// The cached shard of [`write_shard`]'s, as `worker precompute` lays it out for [`config`]; the latents of sample 4 are of another bucket.
fn write_cached(folder: &Path, kinds: &[Kind]) -> String {
    let recipe = config(1, 1).recipe;
    let mut members = vec![(STAMP.to_owned(), Stamp::new("00000.tar", "f32", recipe).to_bytes().unwrap())];
    for (index, kind) in kinds.iter().enumerate() {
        let (size, width) = if *kind == Kind::Wide { ((64, 32), 4) } else { ((40, 36), 2) };
        let mut add = |extension: &str, bytes: Vec<u8>| members.push((format!("{index:04}.{extension}"), bytes));
        add("json", format!(r#"{{"caption_zh": "{index}", "caption_en": "{index}"}}"#).into_bytes());
        match kind {
            Kind::Good | Kind::Wide if index == 4 => add(LATENTS, cached_sample(size, [4, 9, 9], false).to_bytes().unwrap()),
            Kind::Good | Kind::Wide => add(LATENTS, cached_sample(size, [4, 2, width], false).to_bytes().unwrap()),
            Kind::Filtered => add(SKIPPED, b"one_sided: caption_en is missing".to_vec()),
            Kind::NoJson => add(SKIPPED, b"no_json: no member .json".to_vec()),
            Kind::BreaksOff => add(SKIPPED, b"bad_picture: jpg: it ends".to_vec()),
        }
    }
    let members: Vec<(&str, &[u8])> = members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let path = folder.join("cached.tar");
    std::fs::write(&path, tar_of(&members)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The names that were handed out, why others were not, and the shard's end.
fn fates(url: &str) -> (Vec<SampleName>, BTreeMap<u32, Rule>, ShardEnd) {
    let mut rig = Rig::start(config(1, 2));
    rig.handle.grant(vec![lease(0, 0, url)], true);
    let mut names = names(&rig.drain(4));
    // A picture that fails to decode has had its place in a batch; where that is known beforehand the next sample has it.
    names.sort();
    let (skips, end) = rig.reports(LeaseId(100));
    let later = rig.all_skips();
    (names, skips.into_iter().chain(later).map(|skip| (skip.index, skip.rule)).collect(), end)
}

#[test]
fn cached_samples_are_those_of_the_pictures_under_the_same_names() {
    let folder = tempfile::tempdir().unwrap();
    let kinds = mixed(24);
    let (mut names, mut skips, end) = fates(&write_shard(folder.path(), 0, &kinds));
    let (cached_names, cached_skips, cached_end) = fates(&write_cached(folder.path(), &kinds));
    // The one whose latents are of another shape.
    names.retain(|name| name.index != 4);
    skips.insert(4, Rule::BadCache);
    assert_eq!((cached_names, cached_skips, cached_end), (names, skips, end));
}

#[test]
fn cached_samples_carry_what_was_made_and_draw_as_pictures_do() {
    let folder = tempfile::tempdir().unwrap();
    let kinds = [Kind::Wide, Kind::Good];
    let samples = |url: String| {
        let mut rig = Rig::start(config(1, 1));
        rig.handle.grant(vec![lease(0, 0, &url)], true);
        rig.drain(2).into_iter().flat_map(|share| share.batches).flat_map(|batch| batch.samples).collect::<Vec<_>>()
    };
    let (pictures, cached) = (samples(write_shard(folder.path(), 0, &kinds)), samples(write_cached(folder.path(), &kinds)));
    assert_eq!(cached.len(), 2);
    for (picture, cached) in pictures.iter().zip(cached) {
        let width = if cached.name.index == 0 { 4 } else { 2 };
        let wanted = Content::Cached(Box::new(cached_sample(picture.original_size, [4, 2, width], false)));
        // The crop is the one that was made; all else that is random is the sample's own.
        assert_eq!(cached, Prepared { content: wanted, crop: (1, 2), ..picture.clone() });
    }
}

#[test]
fn a_shard_made_for_another_job_is_refused_before_its_first_sample() {
    let folder = tempfile::tempdir().unwrap();
    let url = write_cached(folder.path(), &mixed(8));
    let mut other = config(1, 1);
    other.recipe.settings.insert("data.min_aesthetic".into(), "1".into());
    let mut loader = Loader::start(other, |event| assert!(matches!(event, LoaderEvent::NeedLeases { .. }), "{event:?}")).unwrap();
    loader.handle().grant(vec![lease(0, 0, &url)], true);
    let error = loader.next_share(2).unwrap_err();
    assert!(matches!(&error, Error::Recipe(error) if error.url == url), "{error}");
    assert!(error.to_string().contains("data.min_aesthetic was `6`, is `1`"), "{error}");
}
