// Who shares the cluster: what each tenant has at the instances, what waits, what was turned away.

import { byId, make, reconcile, setText } from "./dom.js";
import { count } from "./format.js";

/** `tenants` as the router lists them; without any, there is nothing to see. */
export function showTenants(tenants) {
  byId("tenants").hidden = tenants.length === 0;
  reconcile(byId("tenant-rows"), tenants, (tenant) => tenant.name, create, update);
}

function create({ name }) {
  const title = make("th", "", name);
  title.scope = "row";
  return make("tr", "", title, ...cells({}).map(() => make("td")));
}

function update(row, tenant) {
  cells(tenant).forEach((text, position) => setText(row.cells[position + 1], text));
}

/** In the order of the columns. */
function cells(tenant) {
  return [
    String(tenant.weight),
    limited(tenant.in_flight, tenant.max_requests),
    limited(tenant.in_flight_tokens, tenant.max_tokens),
    limited(tenant.queued, tenant.max_queued),
    count(tenant.requests),
    count(tenant.tokens),
    count(tenant.rejected),
  ];
}

function limited(value, most) {
  return most ? `${count(value)} of ${count(most)}` : count(value);
}
