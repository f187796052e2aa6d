//! Where one tensor lies in a file, and how it is copied out.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

/// Most bytes a tensor may have that repeats elements of its storage (an expanded view): such a file is small whatever it claims to hold.
const MAX_EXPANDED_BYTES: i64 = 64 << 20;

/// Bytes of each sample of a tensor that it is told from others by.
const SAMPLE_BYTES: usize = 64;

/// The tensors of a file, by name.
pub(crate) type Entries = Vec<(String, Entry)>;

/// The place of one tensor: a strided look at part of a file. Everything is checked against the file when it is made.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    /// The bytes from the first element to the last; empty if there are no elements.
    bytes: Range<usize>,
    kind: Kind,
    shape: Vec<i64>,
    /// In elements, none negative.
    strides: Vec<i64>,
}

impl Entry {
    /// A tensor of `shape` that begins `offset` elements into `storage`, a range of bytes inside its file.
    ///
    /// Errors: what is wrong, in words, if it reaches beyond the storage, or repeats so few elements so often that its size must be a lie.
    pub(crate) fn strided(storage: Range<usize>, kind: Kind, offset: i64, shape: Vec<i64>, strides: Vec<i64>) -> Result<Self, String> {
        let size = kind.elt_size_in_bytes();
        if shape.len() != strides.len() || shape.iter().chain(&strides).chain([&offset]).any(|&number| number < 0) {
            return Err(format!("shape {shape:?}, strides {strides:?} and offset {offset} make no tensor"));
        }
        let beyond = || format!("shape {shape:?} with strides {strides:?} reaches beyond the {} bytes of its storage", storage.len());
        // Zeros count as ones: torch computes strides that way even for a tensor without elements.
        let num_elements = shape.iter().try_fold(1_i64, |product, &length| product.checked_mul(length.max(1))).ok_or_else(beyond)?;
        if shape.contains(&0) {
            return Ok(Self { bytes: storage.start..storage.start, kind, shape, strides });
        }
        let last = shape.iter().zip(&strides).try_fold(0_i64, |sum, (&length, &stride)| sum.checked_add((length - 1).checked_mul(stride)?));
        let byte = |element: i64| usize::try_from(element).ok()?.checked_mul(size)?.checked_add(storage.start);
        let end = last.and_then(|last| byte(last.checked_add(offset)?.checked_add(1)?));
        let (Some(start), Some(end)) = (byte(offset), end.filter(|&end| end <= storage.end)) else { return Err(beyond()) };
        let repeats = num_elements > ((end - start) / size) as i64;
        if repeats && num_elements.saturating_mul(size as i64) > MAX_EXPANDED_BYTES {
            return Err(format!("shape {shape:?} repeats the {} bytes of its storage too often to be believed", storage.len()));
        }
        Ok(Self { bytes: start..end, kind, shape, strides })
    }

    /// A row-major tensor that fills `bytes`.
    ///
    /// Errors: as [`Entry::strided`], and if bytes are left over.
    pub(crate) fn contiguous(bytes: Range<usize>, kind: Kind, shape: Vec<i64>) -> Result<Self, String> {
        let mut strides = vec![1_i64; shape.len()];
        for index in (1..shape.len()).rev() {
            strides[index - 1] = strides[index].saturating_mul(shape[index].max(1));
        }
        let entry = Self::strided(bytes.clone(), kind, 0, shape, strides)?;
        if entry.bytes == bytes { Ok(entry) } else { Err(format!("shape {:?} does not fill its {} bytes", entry.shape, bytes.len())) }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// Bytes in the file that the tensor is made of.
    pub(super) fn num_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// What the tensor is, in words, and the first bytes of it in `file`, those in its middle and its last.
    pub(super) fn sketch<'a>(&self, file: &'a [u8]) -> (String, impl Iterator<Item = &'a [u8]> + use<'a>) {
        let Self { bytes, kind, shape, strides } = self;
        let length = bytes.len().min(SAMPLE_BYTES);
        let last = bytes.end - length;
        let samples = [bytes.start, bytes.start + (last - bytes.start) / 2, last];
        (format!("{kind:?} {shape:?} {strides:?}"), samples.into_iter().filter_map(move |at| file.get(at..at + length)))
    }

    /// The part of the tensor between two rows: a look at the same bytes. `None` if it has fewer.
    pub(super) fn rows(&self, rows: Range<i64>) -> Option<Self> {
        let (&num_rows, &stride) = self.shape.first().zip(self.strides.first())?;
        if rows.start < 0 || rows.start > rows.end || rows.end > num_rows {
            return None;
        }
        let shape = [&[rows.end - rows.start], &self.shape[1..]].concat();
        Self::strided(self.bytes.clone(), self.kind, rows.start.checked_mul(stride)?, shape, self.strides.clone()).ok()
    }

    /// The tensor with rows and columns exchanged: a look at the same bytes. Unchanged if it is no matrix.
    pub(super) fn transposed(mut self) -> Self {
        if self.shape.len() == 2 {
            self.shape.reverse();
            self.strides.reverse();
        }
        self
    }

    /// A 1x1 convolution's weight `[out, in, 1, 1]` as a linear's `[out, in]`. Unchanged if it is something else.
    pub(super) fn pointwise_to_linear(mut self) -> Self {
        if let [_, _, 1, 1] = self.shape[..] {
            self.shape.truncate(2);
            self.strides.truncate(2);
        }
        self
    }

    /// Copies the tensor out of its file, converting on the way.
    pub(crate) fn copy(&self, file: &[u8], kind: Kind, device: Device) -> Tensor {
        let bytes = &file[self.bytes.clone()];
        let mut copy = Tensor::empty(self.shape.as_slice(), (kind, device));
        if bytes.is_empty() {
            return copy;
        }
        let size = self.kind.elt_size_in_bytes();
        // A file may place a tensor off its natural alignment; torch must not read through such a pointer.
        if bytes.as_ptr().align_offset(size) == 0 {
            // SAFETY: `bytes` runs from the first to the last element that shape and strides reach, outlives the view, and is only read.
            let view = unsafe { Tensor::from_blob(bytes.as_ptr(), &self.shape, &self.strides, self.kind, Device::Cpu) };
            copy.copy_(&view);
        } else {
            let aligned = Tensor::from_data_size(bytes, &[(bytes.len() / size) as i64], self.kind);
            copy.copy_(&aligned.as_strided(self.shape.as_slice(), self.strides.as_slice(), 0));
        }
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_views_are_copied_whatever_their_alignment() {
        tch::set_num_threads(1);
        let bytes: Vec<u8> = std::iter::once(0).chain((0..8_i16).flat_map(i16::to_le_bytes)).chain([0]).collect();
        // One of the two starts is odd.
        for start in [0, 1] {
            let file = if start == 0 { &bytes[1..] } else { &bytes[..] };
            let entry = Entry::strided(start..start + 16, Kind::Int16, 1, vec![2, 3], vec![1, 2]).unwrap();
            let copied = entry.copy(file, Kind::Float, Device::Cpu);
            assert_eq!(Vec::<f32>::try_from(copied.flatten(0, -1)).unwrap(), [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
        }
    }

    #[test]
    fn rows_and_transposes_are_other_looks_at_the_same_bytes() {
        tch::set_num_threads(1);
        let file: Vec<u8> = (0..12_i32).flat_map(i32::to_le_bytes).collect();
        let whole = Entry::contiguous(0..48, Kind::Int, vec![6, 2]).unwrap();
        let values = |entry: &Entry| Vec::<i64>::try_from(entry.copy(&file, Kind::Int64, Device::Cpu).flatten(0, -1)).unwrap();
        assert_eq!(values(&whole.rows(2..4).unwrap()), [4, 5, 6, 7]);
        assert_eq!(values(&whole.rows(4..6).unwrap().transposed()), [8, 10, 9, 11]);
        assert!(whole.rows(5..7).is_none() && whole.rows(6..6).unwrap().shape() == [0, 2]);
        let convolution = Entry::contiguous(0..48, Kind::Int, vec![6, 2, 1, 1]).unwrap();
        assert_eq!(convolution.pointwise_to_linear(), whole);
    }

    #[test]
    fn what_reaches_beyond_its_storage_is_refused() {
        let strided = |offset, shape: &[i64], strides: &[i64]| Entry::strided(0..16, Kind::Float, offset, shape.into(), strides.into());
        assert!(strided(0, &[2, 2], &[2, 1]).is_ok());
        assert!(strided(3, &[], &[]).is_ok());
        assert!(strided(99, &[0, 5], &[5, 1]).is_ok());
        assert!(strided(0, &[1024], &[0]).is_ok());
        assert!(strided(1, &[2, 2], &[2, 1]).unwrap_err().contains("reaches beyond the 16 bytes"));
        assert!(strided(0, &[1 << 40], &[0]).unwrap_err().contains("too often"));
        for (offset, shape, strides) in [
            (4, &[][..], &[][..]),
            (0, &[i64::MAX, 2], &[1, 1]),
            (0, &[2, 2], &[i64::MAX, i64::MAX]),
            (i64::MAX, &[1], &[1]),
            (0, &[0, i64::MAX, 2], &[1, 1, 1]),
            (0, &[-1], &[1]),
            (0, &[1], &[-1]),
            (0, &[1], &[]),
        ] {
            assert!(strided(offset, shape, strides).is_err());
        }
        assert!(Entry::contiguous(0..16, Kind::Float, vec![2, 2]).is_ok());
        assert!(Entry::contiguous(0..20, Kind::Float, vec![2, 2]).is_err());
        assert!(Entry::contiguous(0..12, Kind::Float, vec![2, 2]).is_err());
    }
}
