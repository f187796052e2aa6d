//! Files of `torch.save`, read without running the pickle in them, and written.
//!
//! ```text
//! ROOT/data.pkl     a pickle: dicts of tensors, each a strided look into a storage
//! ROOT/data/KEY     a storage: raw little-endian elements
//! ROOT/byteorder    "little", since torch 2.1
//! ROOT/version      "3"
//! ROOT/extra/NAME   whatever its writer adds, which torch passes over; here NAME is metadata.json, texts by name
//! ```

mod pickle;
mod write;
mod zip;

use std::collections::BTreeMap;

use self::pickle::{Arena, Foreign, Id, Node, TensorRecord};
use self::zip::Archive;
use super::entry::{Entries, Entry};

pub(crate) use self::write::serialize;

/// What the key of a whole training state's weights is called, in the order they are looked for.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];
/// Where texts about the tensors lie, which safetensors have a place for and torch's files have not.
const METADATA: &str = "extra/metadata.json";
/// What every key begins with that was saved by a data-parallel wrapper.
const PARALLEL_PREFIX: &str = "module.";
/// Deepest nesting of dicts, most values and longest name: far beyond what any model has, so that a small file cannot name the same
/// tensor a billion times.
const MAX_DEPTH: usize = 32;
const MAX_VISITED: usize = 1 << 18;
const MAX_NAME_BYTES: usize = 512;
/// How files begin that were written before torch 1.6, or with its old format asked for: a pickle of a magic number. The second byte
/// is the protocol's version.
const OLD_MAGIC: &[u8] = b"\x8a\x0al\xfc\x9cF";
/// What the oldest files, which are tar files, have where.
const TAR_MAGIC: (usize, &[u8]) = (257, b"ustar");

/// What is wrong with a file of `torch.save`.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum Fault {
    /// The container is damaged, or no such container.
    #[error("not a whole torch file: {0}")]
    Zip(String),
    /// The pickle is damaged, or does what no state dict's does.
    #[error("its data.pkl is no pickled state dict: {0}")]
    Pickle(String),
    /// Where weights should be is something that would have to be run.
    #[error("its pickle wants to run {0}, which is not done: only tensors in dicts are read")]
    Global(String),
    /// What it says of itself is not to be understood.
    #[error("its extra/metadata.json is damaged: {0}")]
    Metadata(String),
    /// Written before torch 1.6.
    #[error(
        "written in torch's old format; convert it: python -c \"import torch; torch.save(torch.load('OLD', map_location='cpu', weights_only=True), 'NEW')\""
    )]
    OldFormat,
    /// Its elements are in the other order.
    #[error("written on a big-endian machine")]
    BigEndian,
    /// A tensor does not fit its storage.
    #[error("{name}: {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is nothing to read.
    #[error("holds no dict of tensors")]
    NoTensors,
    /// A dict's nesting or size is beyond belief.
    #[error("its dicts hold more than a model could: {0}")]
    TooMuch(String),
}

/// Whether a file is one of torch's, of whatever age, judged by its first bytes.
pub(crate) fn is_torch_file(file: &[u8]) -> bool {
    zip::is_zip(file) || is_old(file)
}

fn is_old(file: &[u8]) -> bool {
    let (at, magic) = TAR_MAGIC;
    let begins_with_magic = matches!(file, [0x80, _, magic @ ..] if magic.starts_with(OLD_MAGIC));
    begins_with_magic || file.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

/// Reads which tensors a file holds and where, under the names that a model's own state dict gives them.
///
/// A training state's other contents are passed over if its weights are under one of the usual keys (`state_dict`, ..); nested dicts are
/// joined with dots; a `module.` before all names is taken off. Objects of classes that are not known may lie beside the weights, not among
/// them.
pub(crate) fn read(file: &[u8]) -> Result<Entries, Fault> {
    let (archive, root) = open(file)?;
    if archive.find_if_there(&format!("{root}/byteorder"))?.is_some_and(|order| &file[order] != b"little") {
        return Err(Fault::BigEndian);
    }

    let (arena, result) = pickle::run(&file[archive.find(&format!("{root}/data.pkl"))?])?;
    let weights = unwrap(&arena, result);
    let mut walk = Walk { arena: &arena, visited: 0, tensors: Vec::new(), foreign: None };
    walk.visit(weights, &mut String::new(), 0)?;
    let Walk { tensors, foreign, .. } = walk;
    match foreign {
        // Under the key of the weights, it could be one of them.
        Some(foreign) if weights != result || tensors.is_empty() => return Err(foreign.fault()),
        None if tensors.is_empty() => return Err(Fault::NoTensors),
        _ => {}
    }
    let parallel = tensors.iter().all(|(name, _)| name.starts_with(PARALLEL_PREFIX));
    let place = |(name, tensor): (String, &TensorRecord)| {
        let entry = place(&archive, root, tensor).map_err(|reason| Fault::Tensor { name: name.clone(), reason })?;
        Ok((if parallel { name[PARALLEL_PREFIX.len()..].to_owned() } else { name }, entry))
    };
    tensors.into_iter().map(place).collect()
}

/// The texts that a file says of itself; none for those of other programs.
pub(crate) fn metadata(file: &[u8]) -> Result<BTreeMap<String, String>, Fault> {
    let (archive, root) = open(file)?;
    let Some(found) = archive.find_if_there(&format!("{root}/{METADATA}"))? else { return Ok(BTreeMap::new()) };
    serde_json::from_slice(&file[found]).map_err(|error| Fault::Metadata(error.to_string()))
}

/// Opens the container; beside it the name of the folder that all its entries lie in.
fn open(file: &[u8]) -> Result<(Archive<'_>, &str), Fault> {
    if is_old(file) {
        return Err(Fault::OldFormat);
    }
    let archive = Archive::open(file)?;
    let root = archive.names().find_map(|name| name.strip_suffix("/data.pkl").filter(|root| !root.contains('/')));
    let root = root.ok_or_else(|| Fault::Zip("a zip file without a data.pkl".into()))?;
    Ok((archive, root))
}

/// The dict that holds the weights: the value itself, or what is under a wrapper's key.
fn unwrap(arena: &Arena<'_>, value: Id) -> Id {
    let mut value = value;
    // Wrappers may be wrapped; each round goes one level down, and no real file goes farther than three.
    for _ in 0..WRAPPERS.len() {
        let Node::Dict(pairs) = arena.get(value) else { break };
        let is_dict = |id: Id| matches!(arena.get(id), Node::Dict(_));
        let under =
            |wrapper| pairs.iter().find(|(key, inner)| is_dict(*inner) && matches!(arena.get(*key), Node::Text(text) if *text == wrapper));
        let bare = pairs.iter().any(|(_, inner)| matches!(arena.get(*inner), Node::Tensor(_)));
        match WRAPPERS.into_iter().find_map(under) {
            Some(&(_, inner)) if !bare => value = inner,
            _ => break,
        }
    }
    value
}

/// The walk through nested dicts that gives each tensor its name.
struct Walk<'w, 'a> {
    arena: &'w Arena<'a>,
    visited: usize,
    tensors: Vec<(String, &'w TensorRecord<'a>)>,
    /// The first value whose class or function is not known.
    foreign: Option<Foreign<'a>>,
}

impl Walk<'_, '_> {
    fn visit(&mut self, id: Id, name: &mut String, depth: usize) -> Result<(), Fault> {
        if depth > MAX_DEPTH {
            return Err(Fault::TooMuch(format!("more than {MAX_DEPTH} levels at {name:?}")));
        }
        match self.arena.get(id) {
            Node::Tensor(tensor) if !name.is_empty() => self.tensors.push((name.clone(), tensor)),
            Node::Dict(pairs) => {
                for (key, value) in pairs {
                    match self.arena.get(*key) {
                        Node::Text(text) => self.visit_inner(text, *value, name, depth)?,
                        Node::Int(number) => self.visit_inner(&number.to_string(), *value, name, depth)?,
                        // Only tensors under names can be asked for.
                        _ => self.count(name)?,
                    }
                }
            }
            Node::List(items) | Node::Tuple(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.visit_inner(&index.to_string(), *item, name, depth)?;
                }
            }
            Node::Foreign(foreign) => _ = self.foreign.get_or_insert(*foreign),
            _ => {}
        }
        Ok(())
    }

    fn visit_inner(&mut self, key: &str, value: Id, name: &mut String, depth: usize) -> Result<(), Fault> {
        self.count(name)?;
        let outer = name.len();
        if outer + key.len() + 1 > MAX_NAME_BYTES {
            return Err(Fault::TooMuch(format!("a name of more than {MAX_NAME_BYTES} bytes at {name:?}")));
        }
        if outer > 0 {
            name.push('.');
        }
        name.push_str(key);
        self.visit(value, name, depth + 1)?;
        name.truncate(outer);
        Ok(())
    }

    fn count(&mut self, name: &str) -> Result<(), Fault> {
        self.visited += 1;
        if self.visited > MAX_VISITED {
            return Err(Fault::TooMuch(format!("more than {MAX_VISITED} values at {name:?}")));
        }
        Ok(())
    }
}

/// Finds a tensor's storage and checks that the tensor lies inside it.
fn place(archive: &Archive<'_>, root: &str, tensor: &TensorRecord<'_>) -> Result<Entry, String> {
    let storage = archive.find(&format!("{root}/data/{}", tensor.storage.key)).map_err(|fault| fault.to_string())?;
    let element = tensor.storage.kind.map_or(1, |kind| kind.elt_size_in_bytes());
    let claimed = usize::try_from(tensor.storage.length).ok().and_then(|length| length.checked_mul(element));
    if claimed != Some(storage.len()) {
        return Err(format!("its storage has {} bytes instead of {} elements of {element}", storage.len(), tensor.storage.length));
    }
    Entry::strided(storage, tensor.kind, tensor.offset, tensor.shape.clone(), tensor.strides.clone())
}

#[cfg(test)]
mod tests;
