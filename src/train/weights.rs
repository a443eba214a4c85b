//! Files of weights: what ours say of the model beside its tensors, and those that a run starts from.

use std::path::Path;

use super::checkpoint::{self, Metadata};
use super::config::TrainConfig;
use super::learner::Learner;
use crate::error::{Error, Result};
use crate::model::dit::Dit;
use crate::routing::Routing;
use crate::safetensors_file::SafetensorsFile;

/// The fixed table of positions, `[1, T, C]`, which is no parameter.
const POSITIONS: &str = "pos_embed";

/// Most that positions may differ from ours, which are at most 1: in bf16 they do by 0.004.
const POSITIONS_DIFFER: f32 = 0.01;

/// Knobs that no shape of a tensor shows, though with another value the same weights are another model.
const UNSEEN: [&str; 6] = ["num_heads", "routing", "beta", "alpha", "seed", "schedule"];

/// What a file of weights says of the model.
pub(super) fn metadata(config: &TrainConfig) -> Metadata {
    let used = |knob: &&str| match *knob {
        "beta" | "alpha" if config.routing == Routing::Dense => false,
        "seed" => config.routing == Routing::Random,
        _ => true,
    };
    UNSEEN.into_iter().filter(used).map(|knob| (knob.to_string(), text_of(config, knob))).collect()
}

fn text_of(config: &TrainConfig, knob: &str) -> String {
    config.toml_of(knob).trim_matches('"').to_string()
}

/// Puts the weights of `init_from`, if there are any, in the place of those that were drawn, and says where they come from and what
/// is another in this run.
///
/// # Errors
/// As [`read_weights`], and when their model had another number of heads.
pub(super) fn start_from_given_weights(config: &TrainConfig, learner: &mut Learner) -> Result<Option<String>> {
    if config.init_from.is_empty() {
        return Ok(None);
    }
    let path = Path::new(&config.init_from);
    if path.is_dir() {
        let checkpoint = checkpoint::resolve(path).ok().and_then(|place| place.checkpoint);
        let file = checkpoint.unwrap_or_else(|| path.into()).join(checkpoint::EMA);
        return Err(Error::file(path, format!("is a directory: give a file of weights, such as {}", file.display())));
    }
    read_weights(path, &learner.dit, &mut learner.weights)?;
    let note = differences(config, &learner.dit, &SafetensorsFile::open(path)?)?;
    learner.ema.copy_from_slice(&learner.weights);
    learner.push()?;
    Ok(Some(format!("starting from the weights in {}{note}", path.display())))
}

/// What of the model of the weights in `file` is another in `config`.
fn differences(config: &TrainConfig, dit: &Dit, file: &SafetensorsFile) -> Result<String> {
    let (was, is) = (file.metadata(), metadata(config));
    if let Some(heads) = was.get("num_heads").filter(|&heads| *heads != is["num_heads"]) {
        let what = format!("has the weights of a model with {heads} heads: give --num-heads {heads}");
        return Err(Error::file(file.path(), what));
    }
    let mut notes = String::new();
    if let Some(tokens) =
        file.get(POSITIONS).map(|tensor| tensor.shape[1]).filter(|&tokens| tokens != dit.config.tokens())
    {
        notes += &format!(", which were trained on images of {tokens} tokens; these have {}", dit.config.tokens());
    }
    let told = |metadata: &Metadata| {
        let told = UNSEEN.iter().filter_map(|knob| Some(format!("{knob} {}", metadata.get(*knob)?)));
        told.collect::<Vec<_>>().join(", ")
    };
    // Others may have a seed there, or a schedule of something else.
    if !["num_heads", "routing", "schedule"].iter().all(|knob| was.contains_key(*knob)) {
        notes += &format!(
            "; they do not say how they were trained, and go on with {} (published DiT weights: routing dense, schedule linear)",
            told(&is)
        );
    } else if UNSEEN.iter().any(|knob| was.get(*knob) != is.get(*knob)) {
        notes +=
            &format!("; they were trained with {}, and go on with {}: another model at first", told(was), told(&is));
    }
    Ok(notes)
}

/// Reads `model.safetensors` or `ema.safetensors` of a checkpoint, or weights from elsewhere with the same names, into `buffer`.
///
/// # Errors
/// When the file is missing, damaged or another model's, also one with learned positions.
///
/// # Panics
/// When `buffer` is not as long as the layout of the model.
pub fn read_weights(path: &Path, dit: &Dit, buffer: &mut [f32]) -> Result<()> {
    let file = SafetensorsFile::open(path)?;
    checkpoint::check_names(&file, &dit.layout, &[""], &[POSITIONS])?;
    check_positions(&file, dit)?;
    checkpoint::read_layout(&file, &dit.layout, "", buffer)
}

/// Positions, where they are given, must be ours; but those of other sizes of images may go with the same weights.
fn check_positions(file: &SafetensorsFile, dit: &Dit) -> Result<()> {
    let Some(tensor) = file.get(POSITIONS) else { return Ok(()) };
    let [tokens, c] = [dit.config.tokens(), dit.config.hidden_size];
    if matches!(*tensor.shape, [1, t, width] if width == c && t != tokens) {
        return Ok(());
    }
    let mut given = vec![0.0; tokens * c];
    checkpoint::read_tensor(file, POSITIONS, &[1, tokens, c], &mut given)?;
    let apart = given.iter().zip(dit.positions()).fold(0.0, |most: f32, (a, b)| most.max((a - b).abs()));
    if apart > POSITIONS_DIFFER {
        return Err(Error::file(
            file.path(),
            format!(
                "tensor '{POSITIONS}' is up to {apart:.2} away from the sines and cosines of DiT, which are fixed here: a model that \
                 learned its positions cannot be used"
            ),
        ));
    }
    Ok(())
}
