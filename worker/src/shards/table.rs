//! The table of `worker shards make`: a row a sample, with the line that it begins in.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use csv::ByteRecord;
use serde_json::{Map, Value};

/// Columns whose text is a number in a sample's json.
const SCORES: [&str; 2] = ["watermark", "aesthetic_score"];

/// Why a row cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What rows of its kind are counted by.
    pub kind: &'static str,
    /// The same in words, with what differs from row to row.
    pub words: String,
}

impl Fault {
    /// Words of any kind.
    pub fn new(kind: &'static str, words: impl Into<String>) -> Self {
        Self { kind, words: words.into() }
    }

    fn not_utf8(what: &str) -> Self {
        Self::new("not UTF-8", format!("{what} is not UTF-8: save the table in that encoding (of GBK: iconv -f GB18030 -t UTF-8)"))
    }
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its place, counted from 0 without the header.
    pub number: u64,
    /// The line that it begins in, counted from 1 as editors do.
    pub line: u64,
    /// The picture's path and json, or why it has none.
    pub content: Result<(PathBuf, Map<String, Value>), Fault>,
}

impl Row {
    /// Whether it has a caption under one of the keys that jobs read by default, in whichever language.
    pub fn has_captions(&self) -> bool {
        self.content.as_ref().is_ok_and(|(_, json)| json.keys().any(|key| key.starts_with("caption_")))
    }

    /// What is wrong with it, as far as can be told without reading its picture.
    pub fn fault(&self) -> Option<Fault> {
        let (path, _) = match &self.content {
            Ok(content) => content,
            Err(fault) => return Some(fault.clone()),
        };
        let missing = |why: &str| Some(Fault::new("missing picture", format!("{}: {why}", path.display())));
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => None,
            Ok(_) => missing("it is no file"),
            Err(error) => missing(&error.to_string()),
        }
    }
}

/// Rows that cannot be used: all are counted, the first of each kind are named.
#[derive(Debug, Default)]
pub struct Faults {
    kinds: BTreeMap<&'static str, u64>,
    named: Vec<String>,
}

impl Faults {
    /// Rows that are named, of each kind.
    const NUM_NAMED: u64 = 5;

    /// Counts a row; its line and why, if it is one of the first.
    pub fn count(&mut self, line: u64, fault: &Fault) -> Option<&str> {
        let num = self.kinds.entry(fault.kind).or_default();
        *num += 1;
        if *num > Self::NUM_NAMED {
            return None;
        }
        self.named.push(format!("line {line}: {}", fault.words));
        self.named.last().map(String::as_str)
    }

    /// How many there are.
    pub fn num(&self) -> u64 {
        self.kinds.values().sum()
    }

    /// How many of each kind.
    pub fn kinds(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.kinds.iter().map(|(&kind, &num)| (kind, num))
    }

    /// `missing picture 12, not UTF-8 3`.
    pub fn by_kind(&self) -> String {
        self.kinds().map(|(kind, num)| format!("{kind} {num}")).collect::<Vec<_>>().join(", ")
    }

    /// A line for each that is named, and one for the rest.
    pub fn list(&self) -> String {
        let rest = self.num() - self.named.len() as u64;
        let rest = (rest > 0).then(|| format!("\n  and {rest} more"));
        self.named.iter().map(|named| format!("\n  {named}")).chain(rest).collect()
    }
}

/// The rows of a table, one after the other.
pub struct Rows {
    table: PathBuf,
    folder: PathBuf,
    image_column: String,
    number: u64,
    records: Records,
}

/// What a record holds, or why it is none.
type Cells = Result<Map<String, Value>, Fault>;

enum Records {
    Cells(Box<CellRecords>),
    Json { lines: BufReader<File>, line: u64 },
}

impl Rows {
    /// Opens a table and reads its header, if tables of its kind have one.
    ///
    /// # Errors
    /// One line that names the table: it cannot be read, or has no column of this name.
    pub fn open(table: &Path, image_column: &str) -> Result<Self, String> {
        let named = |error: &dyn std::fmt::Display| format!("--table {}: {error}", table.display());
        let extension = table.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_ascii_lowercase();
        let open = || File::open(table).map_err(|error| named(&error));
        let records = match extension.as_str() {
            "csv" => Records::Cells(Box::new(CellRecords::open(open()?, b',').map_err(|error| named(&error))?)),
            "tsv" => Records::Cells(Box::new(CellRecords::open(open()?, b'\t').map_err(|error| named(&error))?)),
            "jsonl" => Records::Json { lines: BufReader::new(open()?), line: 0 },
            _ => return Err(named(&"a table ends in .csv, .tsv or .jsonl")),
        };
        if let Records::Cells(cells) = &records
            && !cells.header.iter().any(|name| name == image_column)
        {
            let columns = cells.header.join(", ");
            return Err(named(&format!("no column `{image_column}` among {columns}; name the pictures' column with --image-column")));
        }
        let folder = table.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Self { table: table.to_owned(), folder, image_column: image_column.to_owned(), number: 0, records })
    }

    /// The next rows, at most so many; none at the end.
    ///
    /// # Errors
    /// One line that names the table, which can be read no further.
    pub fn take(&mut self, num: usize) -> Result<Vec<Row>, String> {
        let mut rows = Vec::new();
        while rows.len() < num {
            let record = self.records.next().map_err(|error| format!("--table {}: {error}", self.table.display()))?;
            let Some((line, record)) = record else { break };
            rows.push(Row { number: self.number, line, content: record.and_then(|json| self.content(json)) });
            self.number += 1;
        }
        Ok(rows)
    }

    fn content(&self, mut json: Map<String, Value>) -> Result<(PathBuf, Map<String, Value>), Fault> {
        match json.remove(&self.image_column) {
            Some(Value::String(path)) => Ok((self.folder.join(path), json)),
            _ => Err(Fault::new("no picture", format!("no path under `{}`", self.image_column))),
        }
    }
}

impl Records {
    fn next(&mut self) -> io::Result<Option<(u64, Cells)>> {
        let (lines, line) = match self {
            Self::Cells(cells) => return cells.next(),
            Self::Json { lines, line } => (lines, line),
        };
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            if lines.read_until(b'\n', &mut bytes)? == 0 {
                return Ok(None);
            }
            *line += 1;
            let text = bytes.strip_prefix(b"\xef\xbb\xbf").filter(|_| *line == 1).unwrap_or(&bytes).trim_ascii();
            if !text.is_empty() {
                return Ok(Some((*line, object(text))));
            }
        }
    }
}

fn object(text: &[u8]) -> Cells {
    let text = std::str::from_utf8(text).map_err(|_| Fault::not_utf8("the line"))?;
    // The line in it is always the first.
    serde_json::from_str(text).map_err(|error| Fault::new("no JSON object", error.to_string().replace(" at line 1 ", " at ")))
}

/// Records of cells, under the names of a header.
struct CellRecords {
    reader: csv::Reader<File>,
    /// The same file, to look at single bytes of it.
    file: File,
    delimiter: u8,
    header: Vec<String>,
    record: ByteRecord,
}

impl CellRecords {
    fn open(file: File, delimiter: u8) -> Result<Self, String> {
        let mut first = [0; 4];
        let num = file.read_at(&mut first, 0).map_err(|error| error.to_string())?;
        // A mark of byte order, or letters of a header in two bytes each.
        if first.starts_with(b"\xff\xfe") || first.starts_with(b"\xfe\xff") || first[..num].contains(&0) {
            return Err("it is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)".into());
        }
        let clone = file.try_clone().map_err(|error| error.to_string())?;
        // Rows of any length are read, to be told with their lines.
        let reader = csv::ReaderBuilder::new().delimiter(delimiter).has_headers(false).flexible(true).from_reader(clone);
        let mut records = Self { reader, file, delimiter, header: Vec::new(), record: ByteRecord::new() };
        records.advance().map_err(|error| error.to_string())?.ok_or("it has no header")?;
        let name = |name: &[u8]| String::from_utf8(name.to_vec()).map_err(|_| Fault::not_utf8("the header").words);
        records.header = records.record.iter().map(name).collect::<Result<_, _>>()?;
        Ok(records)
    }

    /// Reads the next record; the line that it begins in.
    fn advance(&mut self) -> io::Result<Option<u64>> {
        if !self.reader.read_byte_record(&mut self.record)? {
            return Ok(None);
        }
        let end = self.reader.position();
        // The reader stops behind a line feed or in front of the one that follows a carriage return, and passes over empty lines before a
        // record: only what is behind the record's start is known.
        let mut last = [0];
        let num = self.file.read_at(&mut last, end.byte().saturating_sub(1))?;
        Ok(Some(end.line() - self.num_breaks() - u64::from(last[..num] == *b"\n")))
    }

    /// Line feeds within cells.
    fn num_breaks(&self) -> u64 {
        self.record.as_slice().iter().filter(|&&byte| byte == b'\n').count() as u64
    }

    fn next(&mut self) -> io::Result<Option<(u64, Cells)>> {
        Ok(self.advance()?.map(|line| (line, self.cells())))
    }

    fn cells(&self) -> Cells {
        if self.record.len() != self.header.len() {
            let delimiter = if self.delimiter == b'\t' { "tab" } else { "comma" };
            let more = match self.num_breaks() {
                0 => format!("quote cells that hold a {delimiter}"),
                num => format!("it runs over {} lines, as a cell that begins with `\"` goes on to the next one", num + 1),
            };
            let words = format!("{} columns where the header has {}: {more}", self.record.len(), self.header.len());
            return Err(Fault::new("wrong number of columns", words));
        }
        // An empty cell is no value.
        let filled = self.header.iter().zip(&self.record).filter(|(_, cell)| !cell.is_empty());
        filled
            .map(|(name, cell)| {
                let cell = std::str::from_utf8(cell).map_err(|_| Fault::not_utf8(&format!("`{name}`")))?;
                Ok((name.clone(), value(name, cell)?))
            })
            .collect()
    }
}

/// A cell's value in json.
fn value(name: &str, cell: &str) -> Result<Value, Fault> {
    if SCORES.contains(&name) {
        let number = cell.trim().parse().ok().and_then(serde_json::Number::from_f64);
        return number.map(Value::Number).ok_or_else(|| Fault::new("no number", format!("{name} `{cell}` is no number")));
    }
    Ok(Value::String(cell.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(name: &str, bytes: &[u8]) -> Result<Vec<Row>, String> {
        let folder = tempfile::tempdir().unwrap();
        let table = folder.path().join(name);
        std::fs::write(&table, bytes).unwrap();
        Rows::open(&table, "image")?.take(100)
    }

    /// Each row's line, and what is wrong with it.
    fn faults(name: &str, bytes: &[u8]) -> Vec<(u64, String)> {
        rows(name, bytes).unwrap().into_iter().map(|row| (row.line, row.content.err().map_or(String::new(), |fault| fault.words))).collect()
    }

    #[test]
    fn scores_are_numbers_and_everything_else_is_text() {
        assert_eq!(value("watermark", " 0.25").unwrap(), 0.25);
        assert_eq!(value("caption_zh", "12").unwrap(), "12");
        assert!(value("aesthetic_score", "good").unwrap_err().words.contains("`good` is no number"));
    }

    #[test]
    fn captions_under_other_keys_are_noticed() {
        let row = |json: &str| Row { number: 0, line: 1, content: Ok((PathBuf::new(), serde_json::from_str(json).unwrap())) };
        assert!(row(r#"{"caption_ori_it": "un gatto"}"#).has_captions());
        assert!(!row(r#"{"caption": "a cat", "url": "x"}"#).has_captions());
        assert!(!Row { content: Err(Fault::new("no picture", "no path")), ..row("{}") }.has_captions());
    }

    #[test]
    fn lines_are_those_of_an_editor_whatever_ends_them() {
        let text = "image,caption_zh\na.jpg,红\n\n\nb.jpg,\"one\ntwo\"\nc.jpg\nd.jpg,蓝";
        for text in [text.to_owned(), text.replace('\n', "\r\n"), format!("\u{feff}{text}"), format!("{text}\n")] {
            let lines: Vec<u64> = faults("t.csv", text.as_bytes()).into_iter().map(|(line, _)| line).collect();
            assert_eq!(lines, [2, 5, 7, 8], "{text:?}");
        }
        let json = faults("t.jsonl", "\u{feff}{\"image\": \"a\"}\r\n\r\n{\"image\": 1}\n{\"image\"}\n[]\n".as_bytes());
        assert_eq!(json[0], (1, String::new()));
        assert_eq!(json[1], (3, "no path under `image`".into()));
        assert_eq!(json[2], (4, "expected `:` at column 9".into()));
        assert!(json[3].0 == 5 && json[3].1.contains("expected a map"), "{json:?}");
    }

    #[test]
    fn rows_of_another_length_say_what_a_delimiter_or_a_quote_did() {
        let found = faults("t.csv", b"image,caption_en\na.jpg,red, blue\nb.jpg\nc.jpg,\"red\nd.jpg,a \"b\" c\n");
        assert_eq!(found[0], (2, "3 columns where the header has 2: quote cells that hold a comma".into()));
        assert_eq!(found[1].0, 3);
        assert_eq!(found[2].0, 4);
        assert!(faults("t.tsv", b"image\tcaption_en\na.jpg\tred\tblue\n")[0].1.ends_with("hold a tab"));
        let run_on = faults("t.csv", b"image,caption_en\na.jpg,\"red\nb.jpg,blue\"x,green\n");
        assert_eq!(
            run_on,
            [(2, "3 columns where the header has 2: it runs over 2 lines, as a cell that begins with `\"` goes on to the next one".into())]
        );
    }

    #[test]
    fn other_encodings_are_named() {
        // "红" in GBK.
        let words = faults("t.csv", b"image,caption_zh\na.jpg,\xba\xec\nb.jpg,x\n");
        assert!(
            words[0].0 == 2 && words[0].1.starts_with("`caption_zh` is not UTF-8: save the table") && words[1].1.is_empty(),
            "{words:?}"
        );
        assert!(faults("t.jsonl", b"{\"image\": \"\xba\xec\"}\n")[0].1.starts_with("the line is not UTF-8"));
        assert!(rows("t.csv", b"image,\xba\xec\n").unwrap_err().contains("the header is not UTF-8"));
        for utf16 in [&b"\xff\xfei\0m\0"[..], b"\xfe\xff\0i", b"i\0m\0a\0"] {
            let error = rows("t.csv", utf16).unwrap_err();
            assert!(
                error.starts_with("--table ") && error.ends_with("it is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
                "{error}"
            );
        }
        assert!(rows("t.csv", b"").unwrap_err().ends_with("it has no header"));
    }

    #[test]
    fn the_first_faults_of_each_kind_are_named_and_all_are_counted() {
        let mut faults = Faults::default();
        for line in 0..25 {
            let named = faults.count(line, &Fault::new(if line < 20 { "missing picture" } else { "not UTF-8" }, "why")).is_some();
            assert_eq!(named, !(5..20).contains(&line), "{line}");
        }
        assert_eq!((faults.num(), faults.by_kind().as_str()), (25, "missing picture 20, not UTF-8 5"));
        let list = faults.list();
        assert!(list.starts_with("\n  line 0: why\n") && list.ends_with("\n  line 24: why\n  and 15 more"), "{list}");
    }
}
