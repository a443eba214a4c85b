//! `config.json` of a case: the model's sizes.

use super::archive::Archive;
use crate::error::{Error, Result};
use crate::model::config::{ModelConfig, TASKS};
use crate::regular_file;
use crate::routing::Routing;
use std::path::Path;

/// Longest `config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Most elements of a position embedding that no tensor bears out.
const MAX_POSITIONS: usize = 1 << 24;

/// As written. Keys that are not here (`seed`, `mode`, ..) only describe how a case was made.
#[derive(serde::Deserialize)]
struct Raw {
    hidden_size: usize,
    depth: usize,
    num_heads: usize,
    patch_size: usize,
    input_size: usize,
    in_channels: usize,
    num_classes: usize,
    beta: f64,
    #[serde(default = "four")]
    alpha: f64,
    #[serde(default = "four")]
    mlp_ratio: f64,
    #[serde(default = "yes")]
    learn_sigma: bool,
    #[serde(default = "dtr")]
    init_method: String,
    #[serde(default = "tasks")]
    taskcount: usize,
    #[serde(default = "published_eps")]
    ln_eps: f64,
}

fn four() -> f64 {
    4.0
}
fn yes() -> bool {
    true
}
fn dtr() -> String {
    "DTR".into()
}
fn tasks() -> usize {
    TASKS
}
fn published_eps() -> f64 {
    1e-6
}

/// Reads the model of a case. Sizes that the parameters do not bear out are refused here, before anything is allocated
/// by them.
///
/// # Errors
/// When the file is missing, no such JSON, or describes no model that `params` could belong to.
pub fn read(path: &Path, params: &Archive) -> Result<ModelConfig> {
    let bad = |what: String| Error::file(path, what);
    let unreadable = |e: std::io::Error| bad(format!("cannot be read: {e}"));
    let text = regular_file::read(path, MAX_CONFIG_BYTES).map_err(unreadable)?;
    let raw: Raw = serde_json::from_slice(&text).map_err(|e| bad(format!("is not the sizes of a model: {e}")))?;
    if raw.taskcount != TASKS {
        return Err(bad(format!("taskcount is {}, but only {TASKS} timesteps are supported", raw.taskcount)));
    }
    if raw.ln_eps != 1e-6 {
        return Err(bad(format!("ln_eps is {}, but only 1e-6 is supported", raw.ln_eps)));
    }
    let routing = match raw.init_method.as_str() {
        "random" => Routing::Random,
        "DTR" if raw.beta == 1.0 => Routing::Dense,
        "DTR" => Routing::Paper,
        other => return Err(bad(format!("init_method is '{other:.40}', but it must be DTR or random"))),
    };
    let config = ModelConfig {
        hidden_size: raw.hidden_size,
        depth: raw.depth,
        num_heads: raw.num_heads,
        patch_size: raw.patch_size,
        input_size: raw.input_size,
        in_channels: raw.in_channels,
        num_classes: raw.num_classes,
        null_class: true,
        mlp_ratio: raw.mlp_ratio,
        learn_sigma: raw.learn_sigma,
        routing,
        beta: raw.beta,
        alpha: raw.alpha,
        routing_seed: 0,
    };
    config.check().map_err(|e| bad(e.to_string()))?;
    fit(config, params)
}

/// Checks every size against a shape in the file; the label table tells whether there is a null class.
fn fit(mut config: ModelConfig, params: &Archive) -> Result<ModelConfig> {
    let (c, p) = (config.hidden_size, config.patch_size);
    params.check_shape("x_embedder.proj.weight", &[c, config.in_channels, p, p])?;
    if params.has("pos_embed") {
        params.check_shape("pos_embed", &[1, config.tokens(), c])?;
    } else if config.tokens().saturating_mul(c) > MAX_POSITIONS {
        return Err(params.error(format!("holds no pos_embed, and one of {} x {c} is too large", config.tokens())));
    }
    let last = config.depth - 1;
    params.check_shape(&format!("blocks.{last}.mlp.fc1.weight"), &[config.mlp_size(), c])?;
    // A depth that lies is found out by the last block, unless someone wrote only that one.
    if config.depth > params.names().len() {
        return Err(params.error(format!("holds too few tensors for a model of {} blocks", config.depth)));
    }
    const TABLE: &str = "y_embedder.embedding_table.weight";
    config.null_class = params.shape(TABLE)?.first() != Some(&config.num_classes);
    params.check_shape(TABLE, &[config.label_rows(), c])?;
    Ok(config)
}
