//! What a JPEG's markers say of it, read from all that precedes the bits of its first scan.
//!
//! Source: ITU-T T.81, B.1.1.3 and table B.1, for markers and the segments that follow them; libjpeg's `default_decompress_parms`
//! (jdapimin.c) for the colours, which Pillow goes by.

const SOF0: u8 = 0xc0;
const SOF1: u8 = 0xc1;
const SOF2: u8 = 0xc2;
const DAC: u8 = 0xcc;
const RST0: u8 = 0xd0;
const RST7: u8 = 0xd7;
const EOI: u8 = 0xd9;
const SOS: u8 = 0xda;
const DNL: u8 = 0xdc;
const APP0: u8 = 0xe0;
const APP1: u8 = 0xe1;
const APP2: u8 = 0xe2;
const APP13: u8 = 0xed;
const APP14: u8 = 0xee;
const APP15: u8 = 0xef;
const COM: u8 = 0xfe;

/// The segments of a JPEG, each from its marker to its end. The first scan is the last of them, with all that follows it.
///
/// Bytes between them that belong to none are passed over, as by libjpeg, with a warning.
pub struct Segments<'a>(&'a [u8]);

impl<'a> Segments<'a> {
    pub fn of(jpeg: &'a [u8]) -> Self {
        Self(jpeg)
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        // 0xff is repeated to fill up, and followed by 0 where it is none of a marker's.
        let at = self.0.windows(2).position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff))?;
        let rest = &self.0[at..];
        let len = match rest[1] {
            SOS => rest.len(),
            // These stand alone.
            0x01 | RST0..=EOI => 2,
            _ => segment_len(rest),
        };
        let (segment, after) = rest.split_at(len.min(rest.len()));
        self.0 = after;
        Some(segment)
    }
}

/// The bytes of a segment that has a length, which its marker is not counted in.
fn segment_len(segment: &[u8]) -> usize {
    2 + segment.get(2..4).map_or(0, |len| usize::from(u16::from_be_bytes([len[0], len[1]])))
}

/// A JPEG without what the decoder may stumble over in its header, and libjpeg does not: bytes between the segments, metadata, and an empty
/// list of conditions for arithmetic coding. Its EXIF data and what is said of its colours stay. From its first scan on all is left as it
/// is.
pub fn tidied(jpeg: &[u8]) -> Vec<u8> {
    let is_needed = |segment: &&[u8]| {
        let body = segment.get(4..).unwrap_or_default();
        match segment[1] {
            APP1 => body.starts_with(b"Exif\0\0"),
            APP2..=APP13 => false,
            APP14 => body.len() >= 12 && body.starts_with(b"Adobe") && body[11] <= 2,
            DAC => !body.is_empty(),
            _ => true,
        }
    };
    Segments::of(jpeg).filter(is_needed).flatten().copied().collect()
}

/// A JPEG of one scan without the segments that lie between the scan and its end, where the decoder takes none; `None` if there are none,
/// or anything else than they.
pub fn without_trailing_segments(jpeg: &[u8]) -> Option<Vec<u8>> {
    let scan = Segments::of(jpeg).last().filter(|segment| segment[1] == SOS)?;
    let bits = segment_len(scan);
    let is_end = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff | RST0..=RST7);
    let end = bits + scan.get(bits..)?.windows(2).position(is_end)?;
    let mut rest = scan.get(end..)?;
    while let [0xff, APP0..=APP15 | DNL | COM, ..] = rest {
        rest = rest.get(segment_len(rest)..)?;
    }
    let start = jpeg.len() - scan.len();
    (rest.starts_with(&[0xff, EOI]) && rest.len() < scan.len() - end).then(|| [&jpeg[..start + end], rest].concat())
}

/// One component of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Component {
    id: u8,
    /// Samples across and down, of as many as the finest component has in the same place.
    sampling: (u8, u8),
}

/// How a JPEG is laid out.
#[derive(Debug, Default)]
pub struct Layout {
    components: Vec<Component>,
    is_sequential: bool,
    /// How many components the first scan has.
    num_in_scan: usize,
    has_jfif: bool,
    /// What Adobe's marker says of the colours.
    adobe: Option<u8>,
}

impl Layout {
    /// What is missing or broken is left out: the decoder says what is wrong.
    pub fn of(jpeg: &[u8]) -> Self {
        let mut layout = Self::default();
        for segment in Segments::of(jpeg) {
            let body = segment.get(4..).unwrap_or_default();
            match segment[1] {
                marker @ (SOF0 | SOF1 | SOF2) => {
                    layout.is_sequential = marker != SOF2;
                    let components = body.get(6..).unwrap_or_default().chunks_exact(3);
                    layout.components = components.map(|c| Component { id: c[0], sampling: (c[1] >> 4, c[1] & 15) }).collect();
                }
                SOS => layout.num_in_scan = body.first().copied().unwrap_or_default().into(),
                APP0 if body.len() >= 14 && body.starts_with(b"JFIF\0") => layout.has_jfif = true,
                APP14 if body.len() >= 12 && body.starts_with(b"Adobe") => layout.adobe = Some(body[11]),
                _ => {}
            }
        }
        layout
    }

    /// Whether the three components are red, green and blue rather than luma and chroma.
    pub fn is_rgb(&self) -> bool {
        match self.adobe {
            _ if self.has_jfif => false,
            Some(transform) => transform == 0,
            None => self.components.iter().map(|component| component.id).eq(*b"RGB"),
        }
    }

    /// Whether a sequential picture has a scan for each component, or some other division.
    pub fn is_in_several_scans(&self) -> bool {
        self.is_sequential && self.num_in_scan < self.components.len()
    }

    /// Whether each component has as few or as many samples, across and down, as there may be.
    pub fn has_plain_sampling(&self) -> bool {
        let largest = self.components.iter().fold((0, 0), |(across, down), c| (c.sampling.0.max(across), c.sampling.1.max(down)));
        let is_plain = |sampling: u8, largest: u8| sampling == 1 || sampling == largest;
        self.components.iter().all(|c| is_plain(c.sampling.0, largest.0) && is_plain(c.sampling.1, largest.1))
    }

    /// Whether the first component, which is luma, has fewer samples than another.
    pub fn is_first_coarser(&self) -> bool {
        let first = self.components.first().map_or((0, 0), |first| first.sampling);
        self.components.iter().any(|other| other.sampling.0 > first.0 || other.sampling.1 > first.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(marker: u8, body: &[u8]) -> Vec<u8> {
        [&[0xff, marker][..], &(body.len() as u16 + 2).to_be_bytes(), body].concat()
    }

    #[test]
    fn colours_are_told_as_by_libjpeg() {
        let jfif = segment(APP0, b"JFIF\0\x01\x02\0\0\x01\0\x01\0\0");
        let adobe = |transform| segment(APP14, &[&b"Adobe\0\x64\0\0\0\0"[..], &[transform]].concat());
        let short = segment(APP14, b"Adobe\0\x64\0\0\0\0");
        for (ids, markers, is_rgb) in [
            (*b"\x01\x02\x03", vec![], false),
            (*b"RGB", vec![], true),
            (*b"RGB", vec![short], true),
            (*b"RGB", vec![jfif.clone()], false),
            (*b"\x01\x02\x03", vec![adobe(0)], true),
            (*b"\x01\x02\x03", vec![adobe(0), jfif], false),
            (*b"RGB", vec![adobe(1)], false),
            (*b"\0\x01\x02", vec![adobe(2)], false),
        ] {
            let frame = segment(SOF0, &[8, 0, 8, 0, 8, 3, ids[0], 0x11, 0, ids[1], 0x11, 0, ids[2], 0x11, 0]);
            let jpeg = [&[0xff, 0xd8][..], &markers.concat(), &frame, &segment(SOS, &[3])].concat();
            assert_eq!(Layout::of(&jpeg).is_rgb(), is_rgb, "{ids:?} {markers:?}");
        }
    }
}
