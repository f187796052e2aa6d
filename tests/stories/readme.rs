//! What the documents say is so: links lead somewhere, tests they name exist, figures are those of the benchmarks, messages are said.

use std::fs;
use std::path::{Path, PathBuf};

/// The workspace's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Links of a document: label and target.
fn links(text: &str) -> Vec<(&str, &str)> {
    let mut links = Vec::new();
    for (at, _) in text.match_indices("](") {
        let Some((target, _)) = text[at + 2..].split_once(')') else { continue };
        let label = text[..at].rsplit('[').next().unwrap();
        links.push((label, target));
    }
    links
}

/// The part of an address that a heading can be reached by, as the usual viewers make it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

fn headings(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#'))
}

/// Files below a folder with one of these endings, without what is built or found.
fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if !name.starts_with('.') && !["target", "demo-out", "found", "node_modules"].contains(&name) {
                all.extend(files(&path, endings));
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            all.push(path);
        }
    }
    all
}

#[test]
fn every_link_in_the_documents_leads_somewhere() {
    let documents = files(&root(), &[".md"]);
    assert!(documents.len() >= 5, "{documents:?}");
    let mut lost = Vec::new();
    for document in &documents {
        let text = read(document);
        for (label, target) in links(&text) {
            if target.contains("://") {
                continue;
            }
            let (path, fragment) = target.split_once('#').map_or((target, None), |(path, fragment)| (path, Some(fragment)));
            let file = if path.is_empty() { document.clone() } else { document.parent().unwrap().join(path) };
            let is_there = match fragment {
                None => file.exists(),
                Some(fragment) => file.exists() && headings(&read(&file)).any(|heading| anchor(heading) == fragment),
            };
            if !is_there {
                lost.push(format!("{}: [{label}]({target})", document.display()));
            }
        }
    }
    assert!(lost.is_empty(), "{lost:#?}");
}

#[test]
fn every_test_and_target_that_the_readme_names_exists() {
    let readme = read(&root().join("README.md"));
    let mut num_tests = 0;
    for (label, target) in links(&readme) {
        let Some((module, test)) = label.trim_matches('`').split_once("::") else { continue };
        let file = root().join(target);
        assert_eq!(file.file_stem().unwrap(), module, "[{label}]({target})");
        assert!(read(&file).contains(&format!("\nfn {test}() {{")), "{target} has no test {test}");
        num_tests += 1;
    }
    assert!(num_tests >= 15, "{num_tests}");
    let makefile = read(&root().join("Makefile"));
    for (at, _) in readme.match_indices("make ") {
        let target: String = readme[at + 5..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
        let is_command = readme[..at].ends_with('`') || readme[..at].ends_with("\n    ");
        assert!(!is_command || makefile.contains(&format!("\n{target}:")), "the Makefile has no {target}");
    }
}

/// Numbers of a text, without the commas and stops around them.
fn numbers(text: &str) -> Vec<&str> {
    let is_part = |c: char| c.is_ascii_digit() || c == '.' || c == ',';
    text.split(|c| !is_part(c)).map(|word| word.trim_matches(['.', ','])).filter(|word| !word.is_empty()).collect()
}

#[test]
fn figures_of_the_comparison_stand_in_the_benchmarks() {
    let readme = read(&root().join("README.md"));
    let benchmarks = read(&root().join("BENCHMARKS.md"));
    let mut num_rows = 0;
    for row in readme.lines().filter(|line| line.starts_with('|')) {
        let Some((_, wanted)) = links(row).into_iter().find_map(|(_, target)| target.split_once("BENCHMARKS.md#")) else { continue };
        let mut sections = benchmarks.split("\n## ");
        let section = sections.find(|section| section.lines().next().is_some_and(|heading| anchor(heading) == wanted)).unwrap();
        let known = numbers(section);
        // The first cell names the fault, the last the section.
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        for number in cells[1..cells.len() - 1].iter().flat_map(|cell| numbers(cell)) {
            assert!(known.contains(&number), "{number} is not in {wanted}: {row}");
        }
        num_rows += 1;
    }
    assert!(num_rows >= 5, "{num_rows}");
}

/// Whether a program says this: all parts, one after the other, with at most a line between them.
fn is_said(source: &str, parts: &[&str]) -> bool {
    let (first, rest) = parts.split_first().unwrap();
    source.match_indices(first).any(|(at, _)| {
        let mut from = at + first.len();
        rest.iter().all(|part| {
            let near: String = source[from..].chars().take(200).collect();
            near.find(part).map(|found| from += found + part.len()).is_some()
        })
    })
}

#[test]
fn every_message_that_the_readme_explains_is_still_said() {
    let sources: Vec<String> = ["coordinator/src", "worker", "proto/src", "deploy/setup"]
        .iter()
        .flat_map(|folder| files(&root().join(folder), &[".rs", ".sh"]))
        .filter(|path| !path.to_str().unwrap().contains("tests"))
        .map(|path| {
            let text = read(&path);
            // Strings that go on in the next line, and what tests expect is not what programs say.
            let said = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            said.split("\\\n").map(str::trim_start).collect()
        })
        .collect();
    let readme = read(&root().join("README.md"));
    let section = readme.split("\n## ").find(|section| section.starts_with("When something goes wrong")).unwrap();
    let mut num_messages = 0;
    for row in section.lines().filter(|line| line.starts_with("| `")) {
        // A message with backticks in it stands between double ones.
        let cell = row[2..].split(" | ").next().unwrap();
        let message = cell.trim_start_matches("`` ").trim_end_matches(" ``");
        let message = if message.len() == cell.len() { cell.trim_matches('`') } else { message };
        let parts: Vec<&str> = message.split('…').map(str::trim).filter(|part| !part.is_empty()).collect();
        assert!(parts.concat().len() >= 7, "too short to be looked for: {row}");
        assert!(sources.iter().any(|source| is_said(source, &parts)), "no program says {message:?}");
        num_messages += 1;
    }
    assert!(num_messages >= 25, "{num_messages}");
}
