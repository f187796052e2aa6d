//! Whose a checkpoint store is that other machines reach, too: this run's from its start on, unless another has taken it from it.

use std::path::Path;

use anyhow::Context;
use peapod_proto::ids::{Generation, Step};
use serde::{Deserialize, Serialize};

use super::Exit;
use super::start::random;
use crate::store::{Manifest, Owner, Store};

/// Takes a store that other machines reach, too, for the run whose state is in `state_dir`. `newest` is the checkpoint that was found
/// there.
pub(super) async fn take_over(store: &mut Store, state_dir: &Path, newest: Option<(Step, Generation)>) -> anyhow::Result<Result<(), Exit>> {
    let held = Holding::read(state_dir)?.filter(|held| held.store == store.root());
    let there = store.read_owner().await?;
    if let (Some(held), Some(other)) = (&held, there.as_ref())
        && held.id != other.id
    {
        return Ok(Err(Exit::Refused(format!(
            "the coordinator on {} has taken over {} (at {}), and with it the job of --state-dir {}; to take it back, give another --state-dir",
            other.host,
            store.root(),
            other.since,
            state_dir.display()
        ))));
    }
    let id = match held {
        Some(held) => held.id,
        None => format!("{:016x}", random()?),
    };
    store.take_over(Owner::this(id.clone())).await?;
    if let Some(before) = there.filter(|before| before.id != id) {
        let root = store.root();
        tracing::info!(
            "{root} was the coordinator's on {} (since {}): if that lives, it ends at its next checkpoint",
            before.host,
            before.since
        );
    }
    // After the store knows: a start that fails between the two is as good as none.
    Holding { id, store: store.root().to_owned() }.write(state_dir)?;
    Ok(match store.newest_manifest().await? {
        Some(Manifest { step, generation, .. }) if newest != Some((step, generation)) => {
            let newer = store.location(step, generation);
            Err(Exit::Failed(format!("another coordinator has just stored {newer}: start this one again to go on from there")))
        }
        Some(_) | None => Ok(()),
    })
}

/// That a state folder's run has taken a store. Its starts share the id: one that finds another there has lost the store since.
#[derive(Serialize, Deserialize)]
struct Holding {
    id: String,
    store: String,
}

impl Holding {
    const FILE: &str = "store.json";

    fn read(state_dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = state_dir.join(Self::FILE);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(|| format!("{} cannot be read: remove it", path.display()))?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn write(&self, state_dir: &Path) -> anyhow::Result<()> {
        let path = state_dir.join(Self::FILE);
        std::fs::write(&path, serde_json::to_vec_pretty(self)?).with_context(|| format!("cannot write {}", path.display()))
    }
}
