//! Job files: the demo's with changes.

use toml::{Table, Value};

/// The demo's job, cut down to what a machine trains in a few seconds.
#[derive(Debug, Clone)]
pub struct JobFile(Table);

impl Default for JobFile {
    fn default() -> Self {
        let mut job = Self(include_str!("../../demo/job.toml").parse().expect("the demo's job file"));
        job.set("train.steps", 4).set("train.global_batch", 16).set("train.micro_batch", 8).set("train.warmup_steps", 2);
        job.set("train.decay", "constant").set("data.shuffle_buffer", 16).set("checkpoint.every_steps", 1000).set("checkpoint.keep", 100);
        job
    }
}

impl JobFile {
    /// Sets the field `key`, a path such as `train.steps`.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let (section, field) = self.locate(key);
        section.insert(field, value.into());
        self
    }

    /// Makes the job end after this many passes over the data instead of steps.
    pub fn set_epochs(&mut self, epochs: u32) -> &mut Self {
        let (train, steps) = self.locate("train.steps");
        train.remove(&steps);
        self.set("train.epochs", i64::from(epochs))
    }

    /// Makes the job end after this many steps instead of passes over the data.
    pub fn set_steps(&mut self, steps: u32) -> &mut Self {
        let (train, epochs) = self.locate("train.epochs");
        train.remove(&epochs);
        self.set("train.steps", i64::from(steps))
    }

    /// Makes the job draw from several sources instead of `data.shards`: name, shards, weight.
    pub fn set_sources(&mut self, sources: &[(&str, String, f64)]) -> &mut Self {
        let source = |(name, shards, weight): &(&str, String, f64)| {
            let mut table = Table::new();
            table.insert("name".into(), (*name).into());
            table.insert("shards".into(), vec![shards.clone()].into());
            table.insert("weight".into(), (*weight).into());
            Value::from(table)
        };
        let (data, shards) = self.locate("data.shards");
        data.remove(&shards);
        self.set("data.sources", sources.iter().map(source).collect::<Vec<Value>>())
    }

    fn locate(&mut self, key: &str) -> (&mut Table, String) {
        let mut parts: Vec<&str> = key.split('.').collect();
        let field = parts.pop().unwrap_or_default().to_owned();
        let mut table = &mut self.0;
        for part in parts {
            table = table.entry(part).or_insert_with(|| Table::new().into()).as_table_mut().expect("a section");
        }
        (table, field)
    }
}

impl std::fmt::Display for JobFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
