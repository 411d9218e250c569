//! Dirty bitmaps of QEMU's block nodes: how they are made and removed, and what they hold.

use serde_json::{Value, json};

/// Of every bitmap of ours, in bytes: with the default of 64 KiB small writes count many times over.
pub const GRANULARITY: u64 = 4096;

/// Arguments of `block-dirty-bitmap-add`.
#[must_use]
pub fn to_add(node: &str, name: &str) -> Value {
    json!({ "node": node, "name": name, "granularity": GRANULARITY, "persistent": false })
}

/// Arguments of `block-dirty-bitmap-clear` and `block-dirty-bitmap-remove`.
#[must_use]
pub fn named(node: &str, name: &str) -> Value {
    json!({ "node": node, "name": name })
}

/// A node of the answer to `query-named-block-nodes`.
#[must_use]
pub fn find_node<'a>(nodes: &'a Value, node: &str) -> Option<&'a Value> {
    let mut nodes = nodes.as_array()?.iter();
    nodes.find(|found| found["node-name"].as_str() == Some(node))
}

/// What a node's bitmap holds, in bytes. A mirror's own has no name.
#[must_use]
pub fn count(node: &Value, name: &str) -> Option<u64> {
    let mut bitmaps = node["dirty-bitmaps"].as_array()?.iter();
    let found = bitmaps.find(|bitmap| bitmap["name"].as_str().unwrap_or_default() == name)?;
    Some(found["count"].as_u64().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_are_found_by_node_and_name() {
        let nodes = json!([
            { "node-name": "cd" },
            { "node-name": "root", "dirty-bitmaps": [
                { "count": 3 }, { "name": "set", "count": 5 }, { "name": "odd" },
            ] },
        ]);
        let root = find_node(&nodes, "root").expect("it is there");
        let found = ["", "set", "odd", "none"].map(|name| count(root, name));
        assert_eq!(found, [Some(3), Some(5), Some(0), None]);
        let cd = find_node(&nodes, "cd").expect("it is there");
        assert_eq!((find_node(&nodes, "data"), count(cd, "")), (None, None));
    }
}
