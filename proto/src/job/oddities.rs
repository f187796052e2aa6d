//! What a job may say, and hardly means.

use super::{Decay, Job};

impl Job {
    /// What is allowed and yet looks like a slip, a line each.
    #[must_use]
    pub fn oddities(&self) -> Vec<String> {
        let train = &self.train;
        let mut found = Vec::new();
        if let Some(end) = train.decay_end().filter(|&end| train.warmup_steps >= end) {
            let warmup = train.warmup_steps;
            found.push(format!("train.warmup_steps ({warmup}) leaves none of {end} steps: train.learning_rate is never reached"));
        }
        if train.decay != Decay::Constant && train.final_learning_rate > train.learning_rate {
            found.push("train.final_learning_rate is above train.learning_rate: it grows instead of decaying".into());
        }
        if train.learning_rate == 0.0 {
            found.push("train.learning_rate is 0: nothing is learnt".into());
        }
        let (micro, global) = (train.micro_batch, train.global_batch);
        if micro > global {
            found.push(format!("train.micro_batch ({micro}) is more than train.global_batch ({global}): no part is ever so large"));
        }
        let validation = (!self.validation.shards.is_empty()).then_some(("validation.every_steps", self.validation.every_steps));
        let pictures = (!self.pictures.prompts.is_empty()).then_some(("pictures.every_steps", self.pictures.every_steps));
        for (key, every) in validation.into_iter().chain(pictures) {
            if let Some(steps) = train.steps.filter(|&steps| every > steps) {
                found.push(format!("{key} ({every}) is more than train.steps ({steps}): once at the beginning and once at the end"));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::super::TEMPLATE;
    use super::*;

    #[test]
    fn slips_are_told_and_what_is_usual_is_not() {
        let odd = |train: &str, more: &str| {
            let models = "[model]\npath = \"m\"\n[student]\npath = \"s\"\n[data]\nshards = [\"a.tar\"]\n";
            Job::parse(&format!("{models}[train]\nsteps = 50\n{train}\n{more}")).unwrap().oddities()
        };
        assert_eq!(Job::parse(TEMPLATE).unwrap().oddities(), Vec::<String>::new());
        assert_eq!(odd("warmup_steps = 5", "[pictures]\nprompts = [\"a\"]\nevery_steps = 50"), Vec::<String>::new());
        for (train, more, words) in [
            ("", "", "train.warmup_steps (100) leaves none of 50 steps"),
            ("warmup_steps = 0\nlearning_rate = 0.0\nfinal_learning_rate = 0.0", "", "nothing is learnt"),
            ("warmup_steps = 0\nlearning_rate = 1e-5\nfinal_learning_rate = 1e-4", "", "it grows instead of decaying"),
            ("warmup_steps = 0\nglobal_batch = 4\nmicro_batch = 8", "", "train.micro_batch (8) is more than train.global_batch (4)"),
            ("warmup_steps = 0", "[validation]\nshards = [\"v.tar\"]", "validation.every_steps (1000) is more than train.steps (50)"),
        ] {
            let told = odd(train, more);
            assert!(told.len() == 1 && told[0].contains(words), "{train}: {told:?}");
        }
    }
}
