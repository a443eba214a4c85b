//! Where a configuration comes from (defaults, a file, `--set`, flags) and how it is written back.

use std::fmt::Write as _;
use std::path::Path;

use super::value::{Value, did_you_mean};
use super::{DataKind, KNOBS, Knob, TrainConfig, shape_of};
use crate::data::may_flip;
use crate::diffusion::Prediction;
use crate::error::{Error, Result};
use crate::regular_file;

/// Longest configuration file that is read: a hundred times the full one.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// One `key = value` with the value as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The key.
    pub key: String,
    /// The value, unquoted.
    pub text: String,
}

impl Assignment {
    /// Reads `KEY=VALUE`, as `--set` takes it.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no `=` or no key.
    pub fn from_argument(argument: &str) -> Result<Self> {
        let (key, text) = argument
            .split_once('=')
            .map(|(key, text)| (key.trim(), text.trim()))
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| Error::usage(format!("--set takes KEY=VALUE (such as --set beta=0.5), not '{argument}'")))?;
        let unquoted = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text);
        Ok(Assignment { key: key.replace('-', "_"), text: unquoted.into() })
    }
}

/// The assignments of one source.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    /// What to call the source in messages: a file's path, `--set`, `the command line`.
    pub origin: String,
    /// Its assignments, in order; of two for one key the later one holds.
    pub assignments: Vec<Assignment>,
}

impl Layer {
    /// Reads the TOML file `path`.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be read, is longer than 1 MiB, is no TOML, or has a value that is a table or a list.
    pub fn from_file(path: &Path) -> Result<Self> {
        let fail = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
        let text = regular_file::read(path, MAX_FILE_BYTES).map_err(fail)?;
        let text = String::from_utf8(text).map_err(|_| Error::file(path, "is not UTF-8, so it is no configuration"))?;
        Self::from_toml(&text, &path.display().to_string()).map_err(|what| Error::file(path, what))
    }

    /// Reads TOML text that came from `origin`; the error is a sentence without it.
    fn from_toml(text: &str, origin: &str) -> std::result::Result<Self, String> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            let line = e.span().map_or(String::new(), |span| {
                let before = &text.as_bytes()[..span.start.min(text.len())];
                format!(" in line {}", 1 + before.iter().filter(|&&b| b == b'\n').count())
            });
            format!("is not valid TOML{line}: {}", e.message().replace('\n', " "))
        })?;
        let mut assignments = Vec::with_capacity(table.len());
        for (key, value) in table {
            let text = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(n) => n.to_string(),
                toml::Value::Float(x) => x.to_toml(),
                toml::Value::Boolean(b) => b.to_string(),
                other => {
                    let kind = other.type_str();
                    return Err(format!(
                        "gives '{key}' a value of type {kind}, but the configuration is a flat list of keys"
                    ));
                }
            };
            assignments.push(Assignment { key, text });
        }
        Ok(Layer { origin: origin.into(), assignments })
    }

    /// What is wrong with an assignment of it.
    fn fault(&self, e: &Error) -> Error {
        Error::usage(format!("{e}, in {}", self.origin))
    }

    /// The last text given to `key`.
    pub fn last(&self, key: &str) -> Option<&str> {
        self.assignments.iter().rev().find(|a| a.key == key).map(|a| a.text.as_str())
    }
}

impl TrainConfig {
    /// The configuration that `layers` give, the later ones over the earlier ones and all over the defaults of their model.
    ///
    /// A layer that names another model than the layers before it also takes that model's shape (hidden size, depth, heads,
    /// patch size); shapes given in the same or a later layer then change it. A model whose shape was changed is `custom`.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown key (with the nearest known one), a value of the wrong kind, and everything that
    /// [`validate`](Self::validate) refuses.
    pub fn from_layers(layers: &[Layer]) -> Result<Self> {
        let last = |key| layers.iter().rev().find_map(|layer| layer.last(key));
        let data = last("data").unwrap_or("digits");
        let named = layers.iter().rev().find_map(|layer| Some((layer, layer.last("model")?)));
        let mut config = match named {
            Some((layer, model)) => TrainConfig::preset(model, data).map_err(|e| layer.fault(&e))?,
            None => TrainConfig::preset("digits", data)?,
        };
        for layer in layers {
            config.apply(layer)?;
        }
        config.rename_if_reshaped();
        // Those who learn flows learn nothing else.
        if last("learn_sigma").is_none() {
            config.learn_sigma = config.prediction != Prediction::Flow;
        }
        if last("sample_cfg").is_none() {
            config.sample_cfg = config.default_cfg();
        }
        config.validate()?;
        Ok(config)
    }

    /// Sentences on the values that a layer gave together with one model, or one data set, and that hold for another, which a later layer
    /// names: a file of `--print-config` has all of them.
    pub fn notes_on(layers: &[Layer]) -> Vec<String> {
        let notes = [Self::note_on_model, Self::note_on_flip, Self::note_on_validation, Self::note_on_flow];
        notes.into_iter().filter_map(|note| note(layers)).collect()
    }

    /// A sentence where what a flow has no use for was given with it, or what it has by default is otherwise in a file of something else.
    fn note_on_flow(layers: &[Layer]) -> Option<String> {
        let at = layers.iter().rposition(|layer| layer.last("prediction").is_some())?;
        if layers[at].last("prediction") != Some("flow") {
            return None;
        }
        let (before, after) = layers.split_at(at);
        let default = TrainConfig::default().schedule.to_string();
        if after.iter().rev().find_map(|layer| layer.last("schedule")).is_some_and(|schedule| schedule != default) {
            return Some("schedule has no effect: a flow has its own".to_string());
        }
        let file = before.iter().rev().find(|layer| layer.last("learn_sigma") == Some("true"))?;
        after.iter().all(|layer| layer.last("learn_sigma").is_none()).then(|| {
            format!(
                "learn_sigma is that of {}, not the default of a flow, false: leave it out there to have this",
                file.origin
            )
        })
    }

    /// A sentence where the command line or a file alone says how to validate, but nothing says on what.
    fn note_on_validation(layers: &[Layer]) -> Option<String> {
        let last = |key| layers.iter().rev().find_map(|layer| layer.last(key));
        // A file of --print-config has all.
        let on_what = last("validation_samples").or(last("validation_data"));
        let given = ["validation_every", "validation_seed", "validation_weights", "validation_repeats"]
            .into_iter()
            .find(|key| last(key).is_some())?;
        on_what
            .is_none()
            .then(|| format!("{given} has no effect: give validation_samples or validation_data to validate on"))
    }

    /// A sentence where `flip` was given together with other data, and is not the default of these.
    fn note_on_flip(layers: &[Layer]) -> Option<String> {
        let at = layers.iter().rposition(|layer| layer.last("data").is_some())?;
        let (before, after) = layers.split_at(at);
        let (data, default) = (after[0].last("data")?, may_flip(after[0].last("data")?).to_string());
        let file = before.iter().rev().find(|layer| layer.last("flip").is_some())?;
        let other = file.last("data").is_some_and(|of_file| of_file != data);
        let replaces = other && file.last("flip") != Some(default.as_str());
        (replaces && after.iter().all(|layer| layer.last("flip").is_none())).then(|| {
            format!(
                "flip is that of {}, not the default of the data '{data}', {default}: leave it out there to have this",
                file.origin
            )
        })
    }

    fn note_on_model(layers: &[Layer]) -> Option<String> {
        let at = layers.iter().rposition(|layer| layer.last("model").is_some())?;
        let (before, after) = layers.split_at(at);
        let model = after[0].last("model")?;
        let (file, other) = before.iter().rev().find_map(|layer| Some((layer, layer.last("model")?)))?;
        let (own, others) = (Self::preset(model, "digits").ok()?, Self::preset(other, "digits").ok()?);
        // Keys of the shape come with the model's name.
        let shape = ["model", "hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio"];
        let replaced = |knob: &&Knob| {
            let name = knob.name;
            !shape.contains(&name)
                && own.toml_of(name) != others.toml_of(name)
                && file.last(name).is_some()
                && after.iter().all(|layer| layer.last(name).is_none())
        };
        let names: Vec<&str> = KNOBS.iter().filter(replaced).map(|knob| knob.name).collect();
        (!names.is_empty()).then(|| {
            let origin = &file.origin;
            if let [name] = names[..] {
                return format!(
                    "{name} is that of {origin}, not the default of {model}: leave it out there to have this"
                );
            }
            let names = names.join(", ");
            format!("{names} are those of {origin}, not the defaults of {model}: leave them out there to have these")
        })
    }

    /// The configuration in the file `path` alone (a run's `config.toml`). Where it has no `validation_seed`, that is the seed: it was before it
    /// had a key of its own.
    ///
    /// # Errors
    /// As [`Layer::from_file`] and [`TrainConfig::from_layers`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let layer = Layer::from_file(path)?;
        let told = layer.last("validation_seed").is_some();
        let mut config = Self::from_layers(&[layer]).map_err(|e| match e {
            Error::Usage(what) => Error::file(path, what),
            other => other,
        })?;
        if !told {
            config.validation_seed = config.seed;
        }
        Ok(config)
    }

    /// The configuration of a run that goes on with `layers` over its own.
    ///
    /// # Errors
    /// As [`TrainConfig::from_layers`], and when a layer changes what a run keeps for life ([`Knob::fixed`](super::Knob)).
    pub fn resumed_with(&self, layers: &[Layer]) -> Result<Self> {
        let mut config = self.clone();
        for layer in layers {
            config.apply(layer)?;
        }
        config.rename_if_reshaped();
        config.keep_what_is_left_open(self);
        for knob in KNOBS.iter().filter(|knob| knob.fixed) {
            let (was, is) = (self.toml_of(knob.name), config.toml_of(knob.name));
            if was != is {
                // Others do not change what is trained on.
                let nothing_held_out = knob.name == "validation_samples" && self.validation_samples == 0;
                let instead = if nothing_held_out { ", give --validation-data" } else { "" };
                return Err(Error::usage(format!(
                    "{} cannot change from {was} to {is} when a run is resumed: leave it out{instead}, or start a new run",
                    knob.name
                )));
            }
        }
        config.validate()?;
        Ok(config)
    }

    fn apply(&mut self, layer: &Layer) -> Result<()> {
        if let Some(model) = layer.last("model").filter(|&model| model != self.model) {
            self.set_model(model).map_err(|e| layer.fault(&e))?;
        }
        for Assignment { key, text } in &layer.assignments {
            match self.assign(key, text) {
                Ok(true) => {}
                Ok(false) => {
                    let near = did_you_mean(key, KNOBS.iter().map(|knob| knob.name));
                    return Err(Error::usage(format!(
                        "there is no key '{key}' (in {}){near} (--print-config lists all keys)",
                        layer.origin
                    )));
                }
                Err(expected) => {
                    return Err(Error::usage(format!(
                        "{key} is '{text:.80}' ({}), but it must be {expected}",
                        layer.origin
                    )));
                }
            }
        }
        Ok(())
    }

    /// Takes from `begun` what a file for many runs leaves to the data and the time: they have decided it.
    pub(in crate::train) fn keep_what_is_left_open(&mut self, begun: &Self) {
        for (size, begun) in [
            (&mut self.image_size, begun.image_size),
            (&mut self.in_channels, begun.in_channels),
            (&mut self.num_classes, begun.num_classes),
        ] {
            *size = if *size == 0 { begun } else { *size };
        }
        if self.data_kind == DataKind::Auto {
            self.data_kind = begun.data_kind;
        }
        if self.out.is_empty() {
            self.out.clone_from(&begun.out);
        }
    }

    fn rename_if_reshaped(&mut self) {
        let shape = [self.hidden_size, self.depth, self.num_heads, self.patch_size];
        if shape_of(&self.model) != Some(shape) || self.mlp_ratio != 4.0 {
            self.model = "custom".into();
        }
    }

    /// The whole configuration as TOML, with a comment for every key: what it is, and its default for this model and data.
    pub fn to_toml(&self) -> String {
        let defaults = TrainConfig::preset(&self.model, &self.data).unwrap_or_default();
        let mut out = String::from(
            "# Configuration of dtr-fused train. A key left out has its default; a fixed one cannot change when a run is resumed.\n",
        );
        let mut section = "";
        for knob in KNOBS {
            if knob.section != section {
                section = knob.section;
                let _ = write!(out, "\n# ---- {section} ----\n");
            }
            let (value, default) = (self.toml_of(knob.name), defaults.toml_of(knob.name));
            let default = match knob.name {
                "model" | "data" => "\"digits\"".into(),
                "learn_sigma" => format!("{default}; false for flow"),
                _ => default,
            };
            let fixed = if knob.fixed { "; fixed" } else { "" };
            let _ = write!(out, "# {} (default {default}{fixed})\n{} = {value}\n", knob.help, knob.name);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(origin: &str, pairs: &[(&str, &str)]) -> Layer {
        let assignments = pairs.iter().map(|&(key, text)| Assignment { key: key.into(), text: text.into() }).collect();
        Layer { origin: origin.into(), assignments }
    }

    fn message(layers: &[Layer]) -> String {
        TrainConfig::from_layers(layers).expect_err("a bad configuration").to_string()
    }

    #[test]
    fn the_printed_file_reads_back_as_itself() {
        let mut odd = TrainConfig::preset("DiT-XL/4", "pictures \"of\" cats\\").unwrap();
        (odd.lr, odd.adam_eps, odd.seed, odd.out) = (1.0 / 3.0, 1e-12, i64::MAX as u64, "a\nb".into());
        for config in [TrainConfig::default(), TrainConfig::preset("DiT-S/2", "digits").unwrap(), odd] {
            let text = config.to_toml();
            let read = TrainConfig::from_layers(&[Layer::from_toml(&text, "text").unwrap()]).unwrap();
            assert_eq!(read, config, "{text}");
            assert_eq!(read.to_toml(), text);
        }
    }

    #[test]
    fn every_key_has_a_comment_with_its_default() {
        let text = TrainConfig::default().to_toml();
        for knob in KNOBS {
            let line = text.lines().position(|l| l.starts_with(&format!("{} = ", knob.name))).expect(knob.name);
            let comment = text.lines().nth(line - 1).unwrap();
            assert!(comment.starts_with("# ") && comment.contains("(default "), "{}: {comment}", knob.name);
            assert_eq!(comment.ends_with("; fixed)"), knob.fixed, "{comment}");
            assert!(knob.help.len() > 10, "{}", knob.name);
        }
    }

    #[test]
    fn later_layers_win() {
        let file = Layer::from_toml("steps = 10\nlr = 1\nseed = 3", "f.toml").unwrap();
        let set = layer("--set", &[("lr", "0.5"), ("beta", "0.7"), ("beta", "0.6")]);
        let flags = layer("flags", &[("seed", "9")]);
        let config = TrainConfig::from_layers(&[file, set, flags]).unwrap();
        assert_eq!((config.steps, config.lr, config.beta, config.seed), (10, 0.5, 0.6, 9));
    }

    #[test]
    fn a_model_in_a_later_layer_brings_its_shape_and_keeps_the_rest() {
        let file = Layer::from_toml(&TrainConfig::default().to_toml(), "f.toml").unwrap();
        let config = TrainConfig::from_layers(&[file, layer("flags", &[("model", "DiT-B/4")])]).unwrap();
        assert_eq!((config.model.as_str(), config.hidden_size, config.patch_size), ("DiT-B/4", 768, 4));
        assert_eq!(config.lr, 3e-3);
        let config = TrainConfig::from_layers(&[layer("flags", &[("depth", "2"), ("model", "DiT-S/8")])]).unwrap();
        assert_eq!((config.model.as_str(), config.hidden_size, config.depth, config.lr), ("custom", 384, 2, 1e-4));
    }

    #[test]
    fn values_of_a_file_that_replace_defaults_of_another_model_are_noted() {
        let file = Layer::from_toml(&TrainConfig::default().to_toml(), "my.toml").unwrap();
        let model = |model| layer("flags", &[("model", model), ("lr", "1e-4")]);
        let note = TrainConfig::notes_on(&[file.clone(), model("DiT-XL/2")]).pop().unwrap();
        assert!(note.starts_with("init, steps, batch_size, ") && note.contains("are those of my.toml"), "{note}");
        assert!(!note.contains("lr,") && !note.contains("hidden_size") && !note.contains("alpha"), "{note}");
        assert!(TrainConfig::notes_on(&[file.clone(), model("custom")]).is_empty());
        assert!(TrainConfig::notes_on(&[file]).is_empty());
        let one = layer("my.toml", &[("model", "digits"), ("lr", "3e-3")]);
        let note = TrainConfig::notes_on(&[one, layer("flags", &[("model", "DiT-XL/2")])]).pop().unwrap();
        assert_eq!(note, "lr is that of my.toml, not the default of DiT-XL/2: leave it out there to have this");
        // Who writes a file without a model means its values for any.
        assert!(TrainConfig::notes_on(&[layer("my.toml", &[("steps", "9")]), model("DiT-XL/2")]).is_empty());
    }

    #[test]
    fn a_validation_on_nothing_is_noted() {
        let given = |keys: &[(&str, &str)]| TrainConfig::notes_on(&[layer("flags", keys)]);
        assert!(given(&[("validation_every", "9")])[0].starts_with("validation_every has no effect"));
        assert!(given(&[("validation_seed", "9")])[0].starts_with("validation_seed has no effect"));
        assert!(given(&[("validation_every", "9"), ("validation_samples", "20")]).is_empty());
        assert!(given(&[("steps", "9")]).is_empty());
        let printed = Layer::from_toml(&TrainConfig::default().to_toml(), "my.toml").unwrap();
        assert!(TrainConfig::notes_on(&[printed]).is_empty());
    }

    #[test]
    fn a_file_that_does_not_mirror_other_data_is_noted() {
        let file = Layer::from_toml(&TrainConfig::default().to_toml(), "my.toml").unwrap();
        let data = |more: &[(&str, &str)]| layer("flags", &[&[("data", "src")], more].concat());
        let note = TrainConfig::notes_on(&[file.clone(), data(&[])]).pop().unwrap();
        assert!(note.starts_with("flip is that of my.toml, not the default of the data 'src', true"), "{note}");
        assert!(TrainConfig::notes_on(&[file.clone(), data(&[("flip", "false")])]).is_empty());
        assert!(TrainConfig::notes_on(&[file.clone(), layer("--set", &[("flip", "true")]), data(&[])]).is_empty());
        assert!(TrainConfig::notes_on(&[layer("--set", &[("flip", "false")]), data(&[])]).is_empty());
        assert!(TrainConfig::notes_on(&[file, layer("flags", &[("data", "digits")])]).is_empty());
    }

    #[test]
    fn unknown_keys_name_the_near_one() {
        let near = |key: &str| message(&[layer("f.toml", &[(key, "1")])]);
        assert!(near("batchsize").contains("did you mean 'batch_size'?"), "{}", near("batchsize"));
        assert!(near("learning_rate").contains("there is no key 'learning_rate' (in f.toml)"));
        assert!(near("stepz").contains("did you mean 'steps'?"));
        assert!(near("warmup").contains("did you mean 'warmup_steps'?"));
        assert!(near("checkpoint_evry").contains("'checkpoint_every'"));
        assert!(!near("qqqqqq").contains("did you mean"), "{}", near("qqqqqq"));
        assert!(message(&[layer("x", &[("model", "dit-s/2")])]).contains("did you mean 'DiT-S/2'?"));
        let message = message(&[layer("f.toml", &[("model", "3")]), layer("flags", &[("lr", "1")])]);
        assert!(message.starts_with("there is no model '3'") && message.ends_with(", in f.toml"), "{message}");
    }

    #[test]
    fn values_of_the_wrong_kind_are_refused() {
        for (key, text) in [
            ("steps", "many"),
            ("steps", "-1"),
            ("steps", "1.5"),
            ("lr", "fast"),
            ("flip", "maybe"),
            ("routing", "papr"),
            ("schedule", "sigmoid"),
            ("loss_weight", "p2-1-0"),
            ("loss_weight", "min-snr-0"),
            ("timesteps", "logit-normal-0-0"),
            ("seed", "18446744073709551615"),
            ("keep_checkpoints", "9223372036854775808"),
            ("precision", "f16"),
            ("model", "DiT-M/2"),
            ("model", "DiT-S/3"),
        ] {
            let message = message(&[layer("--set", &[(key, text)])]);
            assert!(message.contains(text) && !message.contains('\n'), "{key}={text}: {message}");
        }
        assert!(Layer::from_toml("[optim]\nlr = 1", "f").unwrap_err().contains("flat"));
        assert!(Layer::from_toml("lr = \n", "f").unwrap_err().contains("line 1"));
        assert!(Layer::from_toml("a = 1\nlr = 1\nlr = 2", "f").unwrap_err().contains("line 3"));
        for argument in ["lr", "=3", ""] {
            assert!(Assignment::from_argument(argument).is_err(), "{argument}");
        }
        let quoted = Assignment::from_argument("out-dir = \"a=b\"").unwrap();
        assert_eq!((quoted.key.as_str(), quoted.text.as_str()), ("out_dir", "a=b"));
    }

    #[test]
    fn a_flow_learns_no_variance_unless_it_is_said() {
        let flow = layer("flags", &[("prediction", "flow")]);
        let learns = |layers: &[Layer]| TrainConfig::from_layers(layers).unwrap().learn_sigma;
        assert!(!learns(std::slice::from_ref(&flow)) && learns(&[layer("flags", &[("prediction", "v")])]));
        let all = Layer::from_toml(&TrainConfig::default().to_toml(), "my.toml").unwrap();
        let note = |layers: &[Layer]| TrainConfig::notes_on(layers).join("; ");
        assert!(learns(&[all.clone(), flow.clone()]));
        let told = "learn_sigma is that of my.toml, not the default of a flow, false: leave it out there to have this";
        assert_eq!(note(&[all.clone(), flow.clone()]), told);
        let said = layer("flags", &[("prediction", "flow"), ("learn_sigma", "true")]);
        assert_eq!(note(&[all, said]), "");
        assert_eq!(note(&[flow]), "");
        let own = TrainConfig { prediction: Prediction::Flow, learn_sigma: false, ..TrainConfig::default() };
        let own = Layer::from_toml(&own.to_toml(), "flow.toml").unwrap();
        assert_eq!(note(std::slice::from_ref(&own)), "");
        assert!(!learns(&[own]));
        let schedule = layer("flags", &[("prediction", "flow"), ("schedule", "linear")]);
        assert_eq!(note(&[schedule]), "schedule has no effect: a flow has its own");
    }

    #[test]
    fn a_resumed_run_keeps_what_makes_it_the_same_run() {
        let config = TrainConfig::default();
        let longer = config.resumed_with(&[layer("flags", &[("steps", "900"), ("beta", "0.8")])]).unwrap();
        assert_eq!(longer.steps, 900);
        for (key, text) in [
            ("beta", "0.7"),
            ("seed", "1"),
            ("model", "DiT-S/2"),
            ("depth", "5"),
            ("prediction", "v"),
            ("validation_seed", "1"),
        ] {
            let e = config.resumed_with(&[layer("flags", &[(key, text)])]).unwrap_err().to_string();
            assert!(e.contains("resumed"), "{key}: {e}");
        }
    }

    #[test]
    fn the_file_that_a_run_was_begun_with_resumes_it() {
        let mut begun = TrainConfig { out: "z".into(), ..TrainConfig::default() };
        begun.fit_to_data(8, 1, 10).unwrap();
        begun.data_kind = DataKind::Images;
        let file = Layer::from_toml(&TrainConfig::default().to_toml(), "my.toml").unwrap();
        assert_eq!(begun.resumed_with(&[file]).unwrap(), begun);
        assert!(begun.resumed_with(&[layer("flags", &[("out", "y")])]).is_err());
    }
}
