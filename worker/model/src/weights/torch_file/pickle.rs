//! A pickle machine that runs no code: it knows the opcodes that state dicts consist of and the few names torch.save refers to.
//!
//! A pickle is a program for a stack machine. Here its values are nodes of one arena, referred to by index, so that whatever a
//! hostile program builds (values shared a million times, containers inside themselves) is bounded by the program's own length and is
//! dropped without recursion. Calling is not generic: each name of [`Callable`] has its own small function below. Every other name is a
//! [`Foreign`] value, and so is whatever the program would make of it: training states hold such beside their tensors.

use std::collections::HashMap;

use tch::Kind;

use super::Fault;

/// Longest program that is read. That of SDXL with its optimiser has about a megabyte.
const MAX_BYTES: usize = 16 << 20;
/// Most values a program may make: fifteen a tensor are usual.
const MAX_NODES: usize = 1 << 21;
/// Most dimensions of a tensor, as in torch.
const MAX_RANK: usize = 64;

/// A value's place in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(u32);

/// A value.
#[derive(Debug, Clone)]
pub(super) enum Node<'a> {
    /// `None`, a float, bytes, a device: what no state dict depends on.
    Opaque,
    Bool,
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Callable(Callable),
    Storage(Storage<'a>),
    Tensor(TensorRecord<'a>),
    Foreign(Foreign<'a>),
}

/// A class or function that is not known, or what it would have made. Nothing is run, and nothing put into it is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Foreign<'a> {
    module: &'a str,
    name: &'a str,
}

impl Foreign<'_> {
    /// What a set of values counts as that was built by opcodes of its own.
    const SET: Self = Self { module: "builtins", name: "set" };

    /// The fault of one where weights should be. The name may be as long as the file.
    pub(super) fn fault(self) -> Fault {
        let brief = |text: &str| text.chars().take(80).collect::<String>();
        Fault::Global(format!("{}.{}", brief(self.module), brief(self.name)))
    }
}

/// What a program may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Callable {
    OrderedDict,
    /// `_rebuild_tensor_v2(storage, offset, size, strides, requires_grad, hooks[, metadata])`
    RebuildTensor,
    /// `_rebuild_tensor_v3(storage, offset, size, strides, requires_grad, hooks, dtype[, metadata])`
    RebuildTensorOfDtype,
    /// `_rebuild_parameter(tensor, requires_grad, hooks)`, and with a state.
    RebuildParameter,
    /// `torch.Size((1, 2))`
    Size,
    Device,
    /// The class of a storage; `None` for one of plain bytes.
    StorageClass(Option<Kind>),
    Dtype(Kind),
}

/// The memory a tensor looks into: an entry of the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    pub(super) kind: Option<Kind>,
    pub(super) key: &'a str,
    /// In elements of `kind`, or bytes.
    pub(super) length: i64,
}

/// A tensor as the program describes it; nothing is checked against its storage yet.
#[derive(Debug, Clone)]
pub(super) struct TensorRecord<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) kind: Kind,
    pub(super) offset: i64,
    pub(super) shape: Vec<i64>,
    pub(super) strides: Vec<i64>,
}

/// All values of a program.
pub(super) struct Arena<'a>(Vec<Node<'a>>);

impl<'a> Arena<'a> {
    pub(super) fn get(&self, id: Id) -> &Node<'a> {
        // Ids come from `push` alone, and nothing is ever removed.
        &self.0[id.0 as usize]
    }

    fn get_mut(&mut self, id: Id) -> &mut Node<'a> {
        &mut self.0[id.0 as usize]
    }

    fn push(&mut self, node: Node<'a>) -> Result<Id, Fault> {
        if self.0.len() >= MAX_NODES {
            return Err(Fault::Pickle(format!("more than {MAX_NODES} values")));
        }
        self.0.push(node);
        // Below `MAX_NODES`.
        Ok(Id((self.0.len() - 1) as u32))
    }
}

/// Runs a program and returns its values and which of them is the result.
pub(super) fn run(program: &[u8]) -> Result<(Arena<'_>, Id), Fault> {
    if program.len() > MAX_BYTES {
        return Err(Fault::Pickle(format!("{} bytes long; at most {MAX_BYTES} are read", program.len())));
    }
    let machine = Machine { program, at: 0, arena: Arena(Vec::new()), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    machine.run()
}

struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    arena: Arena<'a>,
    stack: Vec<Id>,
    /// Heights of the stack at which groups of arguments begin.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(mut self) -> Result<(Arena<'a>, Id), Fault> {
        loop {
            let start = self.at;
            let opcode = self.byte()?;
            match opcode {
                b'.' => {
                    let result = self.pop()?;
                    return Ok((self.arena, result));
                }
                // Frames only help streaming readers; the version of the protocol says nothing that the opcodes do not.
                0x95 => self.skip(8)?,
                0x80 => self.skip(1)?,
                b'(' => self.marks.push(self.stack.len()),
                b'0' => self.pop().map(drop)?,
                b'1' => self.pop_marked().map(drop)?,
                b'q' => {
                    let index = self.byte()?.into();
                    self.memoize(index)?;
                }
                b'r' => {
                    let index = self.u32()?;
                    self.memoize(index)?;
                }
                0x94 => self.memoize(self.memo.len() as u32)?,
                b'h' => {
                    let index = self.byte()?.into();
                    self.recall(index)?;
                }
                b'j' => {
                    let index = self.u32()?;
                    self.recall(index)?;
                }
                b'N' => self.push(Node::Opaque)?,
                0x88 | 0x89 => self.push(Node::Bool)?,
                b'G' => {
                    self.skip(8)?;
                    self.push(Node::Opaque)?;
                }
                b'K' => {
                    let value = self.byte()?.into();
                    self.push(Node::Int(value))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?).into();
                    self.push(Node::Int(value))?;
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?).into();
                    self.push(Node::Int(value))?;
                }
                0x8a => {
                    let length = self.byte()?.into();
                    let value = long(self.bytes(length)?);
                    self.push(value)?;
                }
                0x8b => {
                    let length = self.u32()? as usize;
                    let value = long(self.bytes(length)?);
                    self.push(value)?;
                }
                0x8c => {
                    let length = self.byte()?.into();
                    self.text(length)?;
                }
                b'X' => {
                    let length = self.u32()? as usize;
                    self.text(length)?;
                }
                b'U' | b'C' => {
                    let length = self.byte()?.into();
                    self.skip(length)?;
                    self.push(Node::Opaque)?;
                }
                b'T' | b'B' => {
                    let length = self.u32()? as usize;
                    self.skip(length)?;
                    self.push(Node::Opaque)?;
                }
                b')' => self.push(Node::Tuple(Vec::new()))?,
                0x85..=0x87 => {
                    let items = self.pop_many(usize::from(opcode - 0x84))?;
                    self.push(Node::Tuple(items))?;
                }
                b't' => {
                    let items = self.pop_marked()?;
                    self.push(Node::Tuple(items))?;
                }
                b']' => self.push(Node::List(Vec::new()))?,
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_marked()?;
                    self.append(items)?;
                }
                b'}' => self.push(Node::Dict(Vec::new()))?,
                b's' => {
                    let pair = self.pop_many(2)?;
                    self.set_items(&pair)?;
                }
                b'u' => {
                    let pairs = self.pop_marked()?;
                    self.set_items(&pairs)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(named(module, name))?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Node::Text(module), Node::Text(name)) = (self.arena.get(module), self.arena.get(name)) else {
                        return Err(Fault::Pickle("a name that is no text".into()));
                    };
                    let found = named(module, name);
                    self.push(found)?;
                }
                b'Q' => {
                    let reference = self.pop()?;
                    let storage = self.storage(reference)?;
                    self.push(Node::Storage(storage))?;
                }
                // A class is called to make an object of it, a function for what it returns.
                b'R' | 0x81 => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let result = self.call(function, arguments)?;
                    self.stack.push(result);
                }
                // The state of an ordered dict (`_metadata`) or of a parameter: nothing to do with its tensors.
                b'b' => {
                    self.pop()?;
                    if !matches!(self.arena.get(self.top()?), Node::Dict(_) | Node::Tensor(_) | Node::Foreign(_)) {
                        return Err(Fault::Pickle("a state for something that has none".into()));
                    }
                }
                // Objects made in other ways than by a call; nothing that is known is made so.
                0x92 => {
                    let items = self.pop_many(3)?;
                    self.instance(items.first())?;
                }
                b'o' => {
                    let items = self.pop_marked()?;
                    self.instance(items.first())?;
                }
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.pop_marked()?;
                    self.push(Node::Foreign(Foreign { module, name }))?;
                }
                0x8f => self.push(Node::Foreign(Foreign::SET))?,
                0x90 => {
                    let items = self.pop_marked()?;
                    self.append(items)?;
                }
                0x91 => {
                    self.pop_marked()?;
                    self.push(Node::Foreign(Foreign::SET))?;
                }
                _ => return Err(Fault::Pickle(format!("opcode {opcode:#04x} at byte {start}, which no state dict needs"))),
            }
        }
    }

    /// Makes an object of a class that is not known.
    fn instance(&mut self, class: Option<&Id>) -> Result<(), Fault> {
        match class.map(|class| (*class, self.arena.get(*class))) {
            Some((class, Node::Foreign(_))) => self.stack.push(class),
            _ => return Err(Fault::Pickle("an object of something that is no class".into())),
        }
        Ok(())
    }

    /// Calls one of the known functions. No arguments are copied: what is shared in the program stays shared.
    fn call(&mut self, function: Id, arguments: Id) -> Result<Id, Fault> {
        if let Node::Foreign(_) = self.arena.get(function) {
            return Ok(function);
        }
        let (Node::Callable(function), Node::Tuple(arguments)) = (self.arena.get(function), self.arena.get(arguments)) else {
            return Err(Fault::Pickle("a call of something that is no function".into()));
        };
        let foreign = |id: &Id| if let Node::Foreign(foreign) = self.arena.get(*id) { Some(foreign.fault()) } else { None };
        let unusual =
            || arguments.iter().find_map(foreign).unwrap_or_else(|| Fault::Pickle(format!("{function:?} with unusual arguments")));
        let result = match (*function, arguments.as_slice()) {
            (Callable::OrderedDict, []) => Node::Dict(Vec::new()),
            (Callable::Device, _) => Node::Opaque,
            (Callable::Size, [size]) => return Ok(*size),
            (Callable::RebuildParameter, [tensor, ..]) => return Ok(*tensor),
            (Callable::RebuildTensor, [storage, offset, shape, strides, ..]) => {
                Node::Tensor(self.tensor(*storage, *offset, *shape, *strides, None).ok_or_else(unusual)?)
            }
            (Callable::RebuildTensorOfDtype, [storage, offset, shape, strides, _, _, dtype, ..]) => match self.arena.get(*dtype) {
                Node::Callable(Callable::Dtype(kind)) => {
                    Node::Tensor(self.tensor(*storage, *offset, *shape, *strides, Some(*kind)).ok_or_else(unusual)?)
                }
                _ => return Err(unusual()),
            },
            _ => return Err(unusual()),
        };
        self.arena.push(result)
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id, kind: Option<Kind>) -> Option<TensorRecord<'a>> {
        let (Node::Storage(storage), Node::Int(offset)) = (self.arena.get(storage), self.arena.get(offset)) else { return None };
        let kind = kind.or(storage.kind)?;
        Some(TensorRecord { storage: *storage, kind, offset: *offset, shape: self.numbers(shape)?, strides: self.numbers(strides)? })
    }

    /// A short tuple of integers.
    fn numbers(&self, id: Id) -> Option<Vec<i64>> {
        let Node::Tuple(items) = self.arena.get(id) else { return None };
        let number = |&item: &Id| if let Node::Int(number) = self.arena.get(item) { Some(*number) } else { None };
        if items.len() <= MAX_RANK { items.iter().map(number).collect() } else { None }
    }

    /// A reference to a storage: `("storage", class, key, device, length)`.
    fn storage(&self, reference: Id) -> Result<Storage<'a>, Fault> {
        if let Node::Tuple(items) = self.arena.get(reference)
            && let [tag, class, key, _, length] = items.as_slice()
            && let (Node::Text("storage"), Node::Callable(Callable::StorageClass(kind)), Node::Text(key), Node::Int(length)) =
                (self.arena.get(*tag), self.arena.get(*class), self.arena.get(*key), self.arena.get(*length))
        {
            return Ok(Storage { kind: *kind, key, length: *length });
        }
        Err(Fault::Pickle("a reference that is to no storage".into()))
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), Fault> {
        match self.arena.get_mut(self.top()?) {
            Node::List(list) => list.extend(items),
            Node::Foreign(_) => {}
            _ => return Err(Fault::Pickle("an item for something that is no list".into())),
        }
        Ok(())
    }

    fn set_items(&mut self, pairs: &[Id]) -> Result<(), Fault> {
        match (self.arena.get_mut(self.top()?), pairs.as_chunks()) {
            (Node::Dict(dict), (pairs, [])) => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            (Node::Foreign(_), (_, [])) => {}
            _ => return Err(Fault::Pickle("keys and values for something that is no dict, or an odd number of them".into())),
        }
        Ok(())
    }

    fn memoize(&mut self, index: u32) -> Result<(), Fault> {
        let top = self.top()?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), Fault> {
        let id = *self.memo.get(&index).ok_or_else(|| Fault::Pickle(format!("value {index} was never stored")))?;
        self.stack.push(id);
        Ok(())
    }

    fn push(&mut self, node: Node<'a>) -> Result<(), Fault> {
        let id = self.arena.push(node)?;
        self.stack.push(id);
        Ok(())
    }

    fn text(&mut self, length: usize) -> Result<(), Fault> {
        let text = std::str::from_utf8(self.bytes(length)?).map_err(|_| Fault::Pickle("a text that is not UTF-8".into()))?;
        self.push(Node::Text(text))
    }

    /// The value on top, which belongs to the group begun last.
    fn top(&self) -> Result<Id, Fault> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.get(floor..).and_then(<[Id]>::last).copied().ok_or_else(|| Fault::Pickle("too few values on the stack".into()))
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, Fault> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        Ok(items)
    }

    fn pop_marked(&mut self) -> Result<Vec<Id>, Fault> {
        let mark = self.marks.pop().ok_or_else(|| Fault::Pickle("the end of a group that was never begun".into()))?;
        // `top` keeps the stack from sinking below the last mark.
        Ok(self.stack.split_off(mark))
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(length);
        let bytes = end.and_then(|end| self.program.get(self.at..end)).ok_or_else(|| Fault::Pickle("it ends in the middle".into()))?;
        self.at += length;
        Ok(bytes)
    }

    fn skip(&mut self, length: usize) -> Result<(), Fault> {
        self.bytes(length).map(drop)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        // `bytes` has returned exactly as many as asked for.
        Ok(self.bytes(N)?.try_into().unwrap_or([0; N]))
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    fn line(&mut self) -> Result<&'a str, Fault> {
        let rest = &self.program[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| Fault::Pickle("it ends in a name".into()))?;
        let line = std::str::from_utf8(&rest[..length]).map_err(|_| Fault::Pickle("a name that is not UTF-8".into()))?;
        self.at += length + 1;
        Ok(line)
    }
}

/// A signed little-endian integer; those of more than eight bytes are seeds and the like.
fn long(bytes: &[u8]) -> Node<'static> {
    if bytes.len() > size_of::<i64>() {
        return Node::Opaque;
    }
    let fill = if bytes.last().is_some_and(|&last| last >= 0x80) { 0xff } else { 0 };
    let mut wide = [fill; size_of::<i64>()];
    wide[..bytes.len()].copy_from_slice(bytes);
    Node::Int(i64::from_le_bytes(wide))
}

/// What a name stands for.
fn named<'a>(module: &'a str, name: &'a str) -> Node<'a> {
    let known = match (module, name) {
        ("collections", "OrderedDict") => Some(Callable::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Callable::RebuildTensor),
        ("torch._utils", "_rebuild_tensor_v3") => Some(Callable::RebuildTensorOfDtype),
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Some(Callable::RebuildParameter),
        ("torch", "Size") => Some(Callable::Size),
        ("torch", "device") => Some(Callable::Device),
        ("torch.storage", "UntypedStorage" | "_UntypedStorage") | ("torch", "UntypedStorage") => Some(Callable::StorageClass(None)),
        ("torch" | "torch.cuda" | "torch.storage", name) => {
            storage_kind(name).map(|kind| Callable::StorageClass(Some(kind))).or_else(|| dtype_kind(name).map(Callable::Dtype))
        }
        _ => None,
    };
    known.map_or(Node::Foreign(Foreign { module, name }), Node::Callable)
}

fn storage_kind(name: &str) -> Option<Kind> {
    match name {
        "HalfStorage" => Some(Kind::Half),
        "BFloat16Storage" => Some(Kind::BFloat16),
        "FloatStorage" => Some(Kind::Float),
        "DoubleStorage" => Some(Kind::Double),
        "BoolStorage" => Some(Kind::Bool),
        "ByteStorage" => Some(Kind::Uint8),
        "CharStorage" => Some(Kind::Int8),
        "ShortStorage" => Some(Kind::Int16),
        "IntStorage" => Some(Kind::Int),
        "LongStorage" => Some(Kind::Int64),
        "ComplexFloatStorage" => Some(Kind::ComplexFloat),
        "ComplexDoubleStorage" => Some(Kind::ComplexDouble),
        _ => None,
    }
}

fn dtype_kind(name: &str) -> Option<Kind> {
    match name {
        "float16" | "half" => Some(Kind::Half),
        "bfloat16" => Some(Kind::BFloat16),
        "float32" | "float" => Some(Kind::Float),
        "float64" | "double" => Some(Kind::Double),
        "bool" => Some(Kind::Bool),
        "uint8" => Some(Kind::Uint8),
        "int8" => Some(Kind::Int8),
        "int16" => Some(Kind::Int16),
        "int32" => Some(Kind::Int),
        "int64" => Some(Kind::Int64),
        "complex64" => Some(Kind::ComplexFloat),
        "complex128" => Some(Kind::ComplexDouble),
        "float8_e4m3fn" => Some(Kind::Float8e4m3fn),
        "float8_e5m2" => Some(Kind::Float8e5m2),
        "float8_e4m3fnuz" => Some(Kind::Float8e4m3fnuz),
        "float8_e5m2fnuz" => Some(Kind::Float8e5m2fnuz),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuse(program: &[u8]) -> String {
        run(program).err().unwrap().to_string()
    }

    /// The name of the unknown thing that a program results in.
    fn foreign(program: &[u8]) -> String {
        let (arena, id) = run(program).unwrap();
        let Node::Foreign(foreign) = arena.get(id) else { panic!("{:?}", arena.get(id)) };
        foreign.fault().to_string()
    }

    #[test]
    fn code_is_never_run_and_the_name_is_kept() {
        for (program, name) in [
            (&b"\x80\x02cos\nsystem\n(X\x02\0\0\0lstR."[..], "os.system"),
            (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
            (b"ctorch\nload\n.", "torch.load"),
            (b"(X\x02\0\0\0lsisubprocess\nPopen\n.", "subprocess.Popen"),
            // Objects by a class with arguments, with named ones, and by a group that begins with it.
            (b"cargparse\nNamespace\n)\x81}X\x01\0\0\0aK\x01sb.", "argparse.Namespace"),
            (b"cargparse\nNamespace\n)}\x92.", "argparse.Namespace"),
            (b"(cargparse\nNamespace\nK\x01o.", "argparse.Namespace"),
            // What is put into them.
            (b"ccollections\ndefaultdict\n)R(X\x01\0\0\0aK\x01uX\x01\0\0\0bK\x02s.", "collections.defaultdict"),
            (b"ccollections\ndeque\n)R(K\x01K\x02eK\x03a.", "collections.deque"),
            (b"\x8f(K\x01K\x02\x90.", "builtins.set"),
            (b"(K\x01\x91.", "builtins.set"),
        ] {
            assert!(foreign(program).contains(name), "{name}: {}", foreign(program));
        }
        // Of what is known nothing is made by other opcodes than those that torch uses for it.
        for program in [&b"ctorch\nSize\n)}\x92."[..], b"(K\x01o.", b"(o."] {
            assert!(refuse(program).contains("no class"));
        }
        for opcode in *b"dp" {
            assert!(refuse(&[b'(', opcode, b'.']).contains("which no state dict needs"), "{opcode}");
        }
    }

    #[test]
    fn containers_inside_themselves_are_values_like_others() {
        let (arena, id) = run(b"]q\0h\0a.").unwrap();
        assert!(matches!(arena.get(id), Node::List(items) if items[..] == [id]));
    }

    #[test]
    fn broken_programs_are_refused() {
        for (program, reason) in [
            (&b""[..], "ends in the middle"),
            (b".", "too few values"),
            (b"(.", "too few values"),
            (b"N(0.", "too few values"),
            (b"t.", "never begun"),
            (b"h\x07.", "value 7 was never stored"),
            (b"X\xff\xff\xff\xff", "ends in the middle"),
            (b"X\x01\0\0\0\xff.", "not UTF-8"),
            (b"N)R.", "no function"),
            (b"NQ.", "no storage"),
            (b"}(Nu.", "odd number"),
            (b"NNa.", "no list"),
            (b"NNb.", "has none"),
            (b"\x8b\xff\xff\xff\xff1.", "ends in the middle"),
            (b"NK\x01\x90.", "never begun"),
            (b"ctorch\nSize\n)R.", "unusual arguments"),
        ] {
            assert!(refuse(program).contains(reason), "{reason}: {}", refuse(program));
        }
        let endless: Vec<u8> = std::iter::repeat_n(b'N', MAX_NODES + 1).collect();
        assert!(refuse(&endless).contains("more than"));
    }

    #[test]
    fn long_integers_keep_their_sign() {
        let value = |bytes: &[u8]| if let Node::Int(value) = long(bytes) { value } else { panic!("no integer") };
        let bytes = [&[][..], &[0x7f], &[0x80], &[0xff, 0], &[0, 0, 0, 0, 1]];
        assert_eq!(bytes.map(value), [0, 127, -128, 255, 1 << 32]);
        assert!(matches!(long(&[1; 9]), Node::Opaque));
    }
}
